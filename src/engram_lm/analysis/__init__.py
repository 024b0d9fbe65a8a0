"""Looking at what a memory does: gates, usage of its table, what is lost without it, layer by layer."""
