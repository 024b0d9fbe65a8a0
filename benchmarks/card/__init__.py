"""The parts of benchmarks/gpu.py: a section a file, and what all of them use."""
