"""Converters that a peer does not bring itself; scripts, run in the peer's environment."""
