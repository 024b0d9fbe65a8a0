"""Training: text to tokens, tokens to batches, batches to a model that can stop and go on."""
