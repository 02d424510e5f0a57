"""Errors of the compiler side; each message says what, where, and what to do."""

from inferloom.errors import InferloomError

__all__ = ["InferloomError", "UnsupportedError", "VerifyError"]


class VerifyError(InferloomError):
    """A graph breaks a rule of the IR: a bug in a pass or in hand-written text."""


class UnsupportedError(InferloomError):
    """A model, operator, chip or option that inferloom cannot handle (yet)."""
