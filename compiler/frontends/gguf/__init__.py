"""The GGUF front end: a file of llama.cpp becomes a model-level graph and a source of weights."""
