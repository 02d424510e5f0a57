"""What is measured, one class a file, each imported only where its library is installed.

`Engine(model, threads, options)` loads; `version` says what it is; `generate(prompts, new)` is what `benchmarks.work`
describes. Caches of prefixes are off.
"""
