"""Memory for Hugging Face models: attach and mount, cartridges, our own models as theirs, released layouts."""
