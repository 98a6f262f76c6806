"""Benchmarks of the kernels: `python -m benchmarks.run`, or one of the `bench_*` modules."""
