"""Front ends: model definitions become model-level graphs."""
