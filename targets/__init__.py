"""Targets: chips as data, and the code generators."""
