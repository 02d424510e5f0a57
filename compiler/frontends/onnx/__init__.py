"""The ONNX front end: see `loader`, and docs/onnx.md for what is accepted."""
