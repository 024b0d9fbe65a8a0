"""Pages and figures: what was measured, as one self-contained HTML file that opens without a network."""
