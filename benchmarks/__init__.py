"""Measurements: against this machine's ceilings, taken in the same run (`bench`), and of peers."""
