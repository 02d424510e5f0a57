"""Checkpoints that are already quantised: what `quantization_config` says, and one decoder a format."""
