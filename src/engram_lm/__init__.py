"""Conditional memory (Engram) for language models: address, fetch, fuse."""

__version__ = "0.1.0.dev0"
