"""Bounds of grammars, which those who only pass them on check too."""

MAX_GRAMMAR_BYTES = 64 * 1024
MAX_DEPTH = 64
