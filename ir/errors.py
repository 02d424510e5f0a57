"""Errors of the compiler side; each message says what, where, and what to do."""


class InferloomError(Exception):
    """Base of every error that inferloom raises on purpose."""


class VerifyError(InferloomError):
    """A graph breaks a rule of the IR: a bug in a pass or in hand-written text."""


class UnsupportedError(InferloomError):
    """A model, operator, chip or option that inferloom cannot handle (yet)."""
