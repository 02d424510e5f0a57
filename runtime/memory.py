"""Large zeroed buffers with a stable address."""

from __future__ import annotations

import mmap

import numpy as np

from inferloom.runtime.errors import ArtifactError


class Arena:
    """`size` zeroed bytes from the system, in huge pages where it has them.

    `address` is page-aligned. `bytes` is a uint8 array over all of it; views of it keep the memory mapped, so an
    arena may be dropped while an array that came from it lives on.
    """

    def __init__(self, size: int, what: str) -> None:
        try:
            mapped = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, OverflowError, ValueError) as error:
            raise ArtifactError(f"the system refuses {size:,} bytes for {what}: {error}") from None
        if size >= 2 << 20 and hasattr(mmap, "MADV_HUGEPAGE"):
            try:
                mapped.madvise(mmap.MADV_HUGEPAGE)
            except OSError:
                pass  # a kernel without huge pages: slower, the same bytes
        self.bytes = np.frombuffer(mapped, np.uint8)[:size]
        self.address: int = self.bytes.ctypes.data

    @property
    def size(self) -> int:
        return self.bytes.size
