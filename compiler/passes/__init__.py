"""Passes, one file each; compiler/pipeline.py lists them in order."""
