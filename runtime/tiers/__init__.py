"""State that outlives its place in the pool: memory beside the device, and disk."""
