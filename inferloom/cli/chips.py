"""`inferloom chips`: what can be compiled for."""

from __future__ import annotations

