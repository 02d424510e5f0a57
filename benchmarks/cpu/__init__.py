"""CPUs: kernels against ceilings; the ceilings, this engine and its peers side by side in one run (docs/cpu-benchmarks.md)."""
