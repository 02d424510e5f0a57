"""The errors that inferloom raises on purpose, in one place for users.

The classes live where they are raised (`ir.errors`, `runtime.errors`), so that the runtime needs no
compiler; this module hands them out on first use and holds the face's own.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from inferloom.ir.errors import UnsupportedError, VerifyError
    from inferloom.runtime.errors import ArtifactError, RequestError

__all__ = ["ArtifactError", "InferloomError", "MissingExtraError", "RequestError", "UnsupportedError",
           "UsageError", "VerifyError", "is_inferloom_error"]

_HOME = {"ArtifactError": "inferloom.runtime.errors", "RequestError": "inferloom.runtime.errors",
         "UnsupportedError": "inferloom.ir.errors", "VerifyError": "inferloom.ir.errors"}


class InferloomError(Exception):
    """Base of the face's errors; the message says what went wrong, where, and what to do."""


class UsageError(InferloomError):
    """A path, option or combination of options that makes no sense."""


class MissingExtraError(InferloomError):
    """Something needs an extra that is not installed; the message holds the command that installs it."""


def is_inferloom_error(error: BaseException) -> bool:
    """Whether `error` was raised on purpose by any part of inferloom (imports nothing)."""
    parts = ("inferloom.errors", "inferloom.ir.errors", "inferloom.runtime.errors")
    return any(isinstance(error, sys.modules[part].InferloomError) for part in parts if part in sys.modules)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'inferloom.errors' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
