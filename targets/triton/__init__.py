"""GPU code generation through Triton."""
