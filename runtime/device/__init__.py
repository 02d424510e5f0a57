"""Devices: what holds an artifact's weights and state in memory and runs its steps."""
