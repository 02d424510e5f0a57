"""Reading a GGUF file: metadata and where its tensors lie, with every count checked against the file.

Layout (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), all little-endian: magic, version, number of tensors and
of metadata items; the items; the tensors' names, shapes, types and offsets; then, aligned, their data.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from inferloom.compiler.frontends.gguf.blocks import BLOCKS, OTHER_TYPES, PLAIN
from inferloom.ir.errors import UnsupportedError

VERSIONS = (2, 3)
#: Limits of what is read; real files stay far below them.
MAX_TENSORS, MAX_ITEMS, MAX_NAME, MAX_STRING, MAX_ARRAY, MAX_ALIGNMENT = 1 << 17, 1 << 16, 256, 16 << 20, 1 << 22, 1 << 20
_MAX_DIMS = 4
_NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _LIST = 8, 9


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where a tensor lies. `shape` has the fastest axis last, as NumPy; `type` is ggml's number of its element type."""

    path: Path
    name: str
    type: int
    shape: tuple[int, ...]
    start: int
    stop: int

    def raw(self) -> np.ndarray:
        """Its bytes, mapped from the file (read-only), u8."""
        return np.memmap(self.path, np.uint8, "r", self.start, (self.stop - self.start,))


@dataclass(frozen=True, slots=True)
class GgufFile:
    """The metadata (numbers, texts and lists of them) and the tensors of a file, by name."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def read_gguf(path: Path) -> GgufFile:
    """The checked header of a file. UnsupportedError when it is damaged, or lies about the file."""
    with path.open("rb") as file:
        if path.stat().st_size < 24:
            raise UnsupportedError(f"{path} is not a GGUF file: it has {path.stat().st_size} bytes")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(path, data).read()


class _Reader:
    """A place in the file; whatever is read is checked to lie within it."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 0

    def fail(self, why: str) -> UnsupportedError:
        return UnsupportedError(f"{self.path} is not a GGUF file that can be read: {why} (at byte {self.at})")

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise self.fail(f"{count} bytes are wanted and {len(self.data) - self.at} are left")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def count(self, form: str, most: int, what: str) -> int:
        found = int(self.number(form))
        if found > most:
            raise self.fail(f"{what} is {found}, over the limit of {most}")
        return found

    def text(self, most: int) -> str:
        try:
            return self.take(self.count("<Q", most, "the length of a text")).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"a text is not UTF-8: {error}") from None

    def read(self) -> GgufFile:
        if self.take(4) != b"GGUF":
            raise self.fail("it does not begin with GGUF")
        version = self.number("<I")
        if version not in VERSIONS:
            other = "; it was written big-endian" if version in (v << 24 for v in VERSIONS) else ""
            raise self.fail(f"version {version} is none of {', '.join(map(str, VERSIONS))}{other}")
        tensors, items = self.count("<Q", MAX_TENSORS, "the number of tensors"), self.count("<Q", MAX_ITEMS, "metadata items")
        metadata = self.named(items, lambda name: self.value(self.number("<I")), "metadata item", MAX_STRING)
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 8 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            raise self.fail(f"general.alignment is {alignment!r}, not a power of two from 8 to {MAX_ALIGNMENT}")
        found = self.named(tensors, self.tensor, "tensor", MAX_NAME)
        base = -(-self.at // alignment) * alignment
        return GgufFile(self.path, metadata, self.placed(found, base, alignment))

    def named(self, count: int, value: Callable[[str], Any], what: str, longest: int) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for _ in range(count):
            name = self.text(longest)
            if name in made:
                raise self.fail(f"{what} {name!r} occurs twice")
            made[name] = value(name)
        return made

    def value(self, kind: int) -> Any:
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _STRING:
            return self.text(MAX_STRING)
        if kind != _LIST:
            raise self.fail(f"a value has the unknown type {kind}")
        inner, count = self.number("<I"), self.count("<Q", MAX_ARRAY, "the length of a list")
        if inner in _NUMBERS:
            form = _NUMBERS[inner][1]
            return list(struct.unpack(f"<{count}{form}", self.take(count * struct.calcsize(form))))
        if inner != _STRING:
            raise self.fail(f"a list has elements of the type {inner}; numbers and texts are read")
        return [self.text(MAX_STRING) for _ in range(count)]

    def tensor(self, name: str) -> tuple[tuple[int, ...], int, int]:
        """Shape, type and offset of a tensor."""
        dims = [int(self.number("<Q")) for _ in range(self.count("<I", _MAX_DIMS, f"the number of axes of {name}"))]
        kind, offset = int(self.number("<I")), int(self.number("<Q"))
        if not dims or min(dims) < 1 or math.prod(dims) > 2**48:
            raise self.fail(f"{name} has the shape {dims[::-1]}")
        if kind not in BLOCKS and kind not in PLAIN:
            known = ", ".join([*(p.name for p in PLAIN.values()), *(b.name for b in BLOCKS.values())])
            raise self.fail(f"{name} has the type {OTHER_TYPES.get(kind, kind)}; these are read: {known}")
        return tuple(dims[::-1]), kind, offset

    def placed(self, found: dict[str, tuple[tuple[int, ...], int, int]], base: int, alignment: int) -> dict[str, GgufTensor]:
        """Tensors with their bytes, which must lie in the file, aligned and apart from each other."""
        made: dict[str, GgufTensor] = {}
        for name, (shape, kind, offset) in found.items():
            elements, size = (1, PLAIN[kind].dtype.itemsize) if kind in PLAIN else (BLOCKS[kind].size, BLOCKS[kind].bytes)
            if shape[-1] % elements:
                raise self.fail(f"{name} has rows of {shape[-1]}, which are not whole blocks of {elements}")
            start, length = base + offset, math.prod(shape) // elements * size
            if offset % alignment or start + length > len(self.data):
                raise self.fail(f"{name} lies at {start} to {start + length} of {len(self.data)} bytes, aligned to {alignment}")
            made[name] = GgufTensor(self.path, name, kind, shape, start, start + length)
        ordered = sorted(made.values(), key=lambda t: t.start)
        for first, second in zip(ordered, ordered[1:]):
            if first.stop > second.start:
                raise self.fail(f"{first.name} and {second.name} overlap")
        return made
