"""Quantised weights: schemes, and tensors of integers with their scales."""
