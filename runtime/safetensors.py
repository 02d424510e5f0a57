"""Safetensors, read with suspicion and written deterministically.

Format (https://huggingface.co/docs/safetensors): a little-endian u64 header length, a JSON header, then the data
section; each tensor's offsets are relative to the data section. The sections of files written here start on a
multiple of 64 bytes (the header is padded with spaces), so that a mapped file gives aligned tensors.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inferloom.runtime.errors import ArtifactError

DTYPE_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
               "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8}
MAX_HEADER = 64 << 20
"""Largest header read, in bytes; that of a model with 100,000 tensors takes some 12 MB."""
_ALIGN = 64


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """`begin` and `end` are byte offsets in the data section."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """`data_offset`: byte offset of the data section in the file."""

    data_offset: int
    tensors: dict[str, TensorInfo]


def read_header(path: str | os.PathLike[str]) -> Header:
    """The checked header of a file. ArtifactError when it is damaged or lies about the file."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        length = _header_length(prefix, size, str(path))
        return parse_header(prefix + file.read(length), size, str(path))


def parse_header(data: bytes | memoryview, size: int, where: str = "safetensors") -> Header:
    """The header of a file of `size` bytes whose first bytes are `data` (at least the whole header)."""
    length = _header_length(bytes(data[:8]), size, where)
    text = bytes(data[8 : 8 + length])
    if len(text) != length:
        raise ArtifactError(f"{where}: the header ends early, after {len(text)} of {length} bytes")
    try:
        parsed = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{where}: the header is not JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise ArtifactError(f"{where}: the header is not a JSON object")
    metadata = parsed.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ArtifactError(f"{where}: __metadata__ is not an object of strings")
    tensors = {name: _tensor(record, f"{where}: tensor {name!r}") for name, record in parsed.items()}
    _check_cover(tensors, size - 8 - length, where)
    return Header(8 + length, tensors)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _header_length(prefix: bytes, size: int, where: str) -> int:
    if len(prefix) < 8 or size < 8:
        raise ArtifactError(f"{where}: {size} bytes are too few for a safetensors file")
    length = int(struct.unpack("<Q", prefix)[0])
    if length > MAX_HEADER:
        raise ArtifactError(f"{where}: a header of {length} bytes is over the limit of {MAX_HEADER}")
    if 8 + length > size:
        raise ArtifactError(f"{where}: a header of {length} bytes does not fit a file of {size} bytes")
    return length


def _tensor(record: object, where: str) -> TensorInfo:
    if not isinstance(record, dict) or record.keys() != {"dtype", "shape", "data_offsets"}:
        raise ArtifactError(f"{where} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = record["dtype"], record["shape"], record["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise ArtifactError(f"{where} has unknown dtype {dtype!r}; known: {', '.join(DTYPE_BYTES)}")
    if not _naturals(shape) or len(shape) > 64:
        raise ArtifactError(f"{where}: shape must be a list of at most 64 numbers from 0 to 2**48")
    if not _naturals(offsets) or len(offsets) != 2:
        raise ArtifactError(f"{where}: data_offsets must be two numbers from 0 to 2**48")
    begin, end = offsets
    need = math.prod(shape) * DTYPE_BYTES[dtype]
    if end - begin != need:
        raise ArtifactError(f"{where}: {dtype} {shape} takes {need} bytes, but its offsets span {end - begin}")
    return TensorInfo(dtype, tuple(shape), begin, end)


def _naturals(value: object) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v <= 2**48 for v in value)


def _check_cover(tensors: dict[str, TensorInfo], data_bytes: int, where: str) -> None:
    """The tensors cover the data section exactly: no overlap, no hole, nothing outside."""
    at = 0
    for name, t in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if t.begin != at:
            raise ArtifactError(f"{where}: tensor {name!r} begins at {t.begin}, but the one before ends at {at}: "
                                + ("they overlap" if t.begin < at else "there is a hole"))
        at = t.end
    if at != data_bytes:
        raise ArtifactError(f"{where}: the tensors take {at} bytes, but the data section has {data_bytes}")


def write(path: str | os.PathLike[str], entries: Sequence[tuple[str, str, Sequence[int]]],
          buffers: Iterable[bytes | memoryview]) -> Header:
    """Write tensors (name, dtype, shape) in the given order, taking their bytes from `buffers` one at a time.

    The same arguments give the same file. The data section starts on a multiple of 64 bytes. Raises ArtifactError,
    and leaves no file, when a name repeats, a dtype is unknown, or the buffers' number or sizes do not match.
    """
    at, tensors = 0, {}
    for name, dtype, shape in entries:
        if name in tensors or name == "__metadata__":
            raise ArtifactError(f"{path}: tensor name {name!r} occurs twice or is reserved")
        if dtype not in DTYPE_BYTES:
            raise ArtifactError(f"{path}: tensor {name!r} has unknown dtype {dtype!r}")
        end = at + math.prod(shape) * DTYPE_BYTES[dtype]
        tensors[name] = TensorInfo(dtype, tuple(int(n) for n in shape), at, end)
        at = end
    records = {n: {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [t.begin, t.end]}
               for n, t in tensors.items()}
    text = json.dumps(records, separators=(",", ":")).encode("ascii")
    text += b" " * (-(8 + len(text)) % _ALIGN)
    if len(text) > MAX_HEADER:
        raise ArtifactError(f"{path}: a header of {len(text)} bytes is over the limit of {MAX_HEADER}")
    try:
        _write_body(Path(path), struct.pack("<Q", len(text)) + text, tensors, buffers)
    except BaseException:
        Path(path).unlink(missing_ok=True)
        raise
    return Header(8 + len(text), tensors)


def _write_body(path: Path, head: bytes, tensors: dict[str, TensorInfo],
                buffers: Iterable[bytes | memoryview]) -> None:
    source = iter(buffers)
    with open(path, "wb") as file:
        file.write(head)
        for name, t in tensors.items():
            buffer = next(source, None)
            if buffer is None:
                raise ArtifactError(f"{path}: there is no buffer for tensor {name!r}")
            count = memoryview(buffer).nbytes
            if count != t.end - t.begin:
                raise ArtifactError(f"{path}: tensor {name!r} takes {t.end - t.begin} bytes, its buffer has {count}")
            file.write(buffer)
            del buffer  # before the next one is made: one tensor in memory at a time
        if next(source, None) is not None:
            raise ArtifactError(f"{path}: there are more buffers than tensors ({len(tensors)})")
        file.flush()
        os.fsync(file.fileno())
