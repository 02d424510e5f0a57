"""Models that ship with the project: a small trained one and plain definitions."""
