"""What chatd costs, measured beside the plain way of doing the same: `python -m benchmarks`."""
