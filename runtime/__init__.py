"""The thin runtime: opens sealed artifacts and runs them. Imports the standard library, NumPy and BLAKE3 only."""
