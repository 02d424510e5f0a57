"""The graph IR: types, operations, graphs, their text form, verifier and NumPy interpreter."""
