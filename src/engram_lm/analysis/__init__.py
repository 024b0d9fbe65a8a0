"""Looking at what a memory does: gates over a text, figures, and the report of a run."""
