"""These tests run generated kernels in Triton's interpreter, which needs a process of its own: `make interpret`."""

from __future__ import annotations

import os

# One process cannot both interpret and compile, and Triton decides when it is imported.
collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
