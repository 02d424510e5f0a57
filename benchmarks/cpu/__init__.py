"""Benchmarks of CPUs: kernels against ceilings, and the engine against its peers."""
