"""CPU code generation through TVM."""
