"""Nine published benchmarks: python -m benchmarks --help."""
