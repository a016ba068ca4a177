"""What the check costs on a GPU: `python -m benchmarks.gpu --out DIR`."""
