"""`python -m engram_lm` is the `engram-lm` command."""

from engram_lm.cli import main

if __name__ == "__main__":
    main()
