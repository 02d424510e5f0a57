"""Where parameters come from: one tensor at a time, in the element type that the checkpoint stores."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from inferloom.ir.errors import UnsupportedError

#: safetensors' names of element types (https://github.com/huggingface/safetensors, "Format").
STORED = {"F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"),
          "BF16": np.dtype(ml_dtypes.bfloat16), "I64": np.dtype("<i8"), "I32": np.dtype("<i4"),
          "I8": np.dtype("i1"), "U8": np.dtype("u1"), "BOOL": np.dtype("bool"),
          "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn)}

MAX_HEADER = 100 << 20


class WeightSource(Protocol):
    """Tensors by the `source` of a graph's params, the buffers of the front end among them."""

    def names(self) -> tuple[str, ...]:
        """Every source that `load` knows."""

    def load(self, source: str) -> np.ndarray:
        """One tensor in the stored element type (bf16 as ml_dtypes.bfloat16); KeyError when unknown."""


@dataclass(frozen=True, slots=True)
class ArraySource:
    """A WeightSource over arrays, or over functions that make them, in memory."""

    arrays: Mapping[str, np.ndarray | Callable[[], np.ndarray]]

    def names(self) -> tuple[str, ...]:
        return tuple(self.arrays)

    def load(self, source: str) -> np.ndarray:
        found = self.arrays[source]
        return found() if callable(found) else found


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies: file, element type, shape, and byte range from the start of the file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    def read(self) -> np.ndarray:
        """The tensor, mapped from the file (read-only)."""
        if 0 in self.shape:
            return np.zeros(self.shape, STORED[self.dtype])
        raw = np.memmap(self.path, np.uint8, "r", self.start, (self.stop - self.start,))
        return raw.view(STORED[self.dtype]).reshape(self.shape)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file; UnsupportedError when the header is damaged or lies outside the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 0 < length <= min(MAX_HEADER, size - 8):
            raise UnsupportedError(f"{path} is not a safetensors file: its header claims {length} bytes of {size}")
        try:
            header = json.loads(file.read(length))
            tensors = {name: _stored(path, 8 + length, size, spec) for name, spec in header.items()
                       if name != "__metadata__"}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UnsupportedError(f"{path} has a damaged safetensors header: {error}") from None
    return tensors


def _stored(path: Path, base: int, size: int, spec: dict[str, Any]) -> StoredTensor:
    if spec["dtype"] not in STORED:
        raise ValueError(f"element type {spec['dtype']} is not supported")
    shape = tuple(int(d) for d in spec["shape"])
    start, stop = (int(o) for o in spec["data_offsets"])
    wanted = STORED[spec["dtype"]].itemsize
    for d in shape:
        wanted *= d
    if min((0, *shape)) < 0 or not 0 <= start <= stop <= size - base or stop - start != wanted:
        raise ValueError(f"a tensor of shape {shape} lies at bytes {start}..{stop} of {size - base}")
    return StoredTensor(path, spec["dtype"], shape, base + start, base + stop)


def read_checkpoint(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint folder: `model.safetensors`, or the shards of its index file.

    UnsupportedError when there are only pickled weights, a shard is missing or lies outside the folder.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = sorted({str(s) for s in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UnsupportedError(f"{index} is damaged: {error!r}") from None
    elif (folder / "model.safetensors").is_file():
        shards = ["model.safetensors"]
    else:
        shards = sorted(p.name for p in folder.glob("*.safetensors"))
    if not shards:
        pickled = [p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth")]
        found = f"only pickled weights ({', '.join(sorted(pickled))})" if pickled else "no weights"
        raise UnsupportedError(f"{folder} has {found}; inferloom reads safetensors only, since unpickling can run code. "
                               "Convert with transformers: model.save_pretrained(folder)")
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        path = folder / shard
        if Path(shard).name != shard:
            raise UnsupportedError(f"{index} names a shard outside of the folder: {shard!r}")
        if not path.is_file():
            raise UnsupportedError(f"{folder} lacks the shard {shard} that its index names")
        tensors.update(read_header(path))
    return tensors


class Tensor(Protocol):
    """A tensor of a checkpoint, or one made of several, that is not read yet."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    def read(self) -> np.ndarray: ...


@dataclass(frozen=True, slots=True)
class CheckpointSource:
    """A WeightSource over a checkpoint; `where` maps sources to tensors, `buffers` are in memory."""

    where: Mapping[str, Tensor]
    buffers: Mapping[str, np.ndarray]

    def names(self) -> tuple[str, ...]:
        return (*self.where, *self.buffers)

    def load(self, source: str) -> np.ndarray:
        return self.buffers[source] if source in self.buffers else self.where[source].read()


def resolve(held: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]], aliases: Mapping[str, tuple[str, ...]],
            folder: Path | str) -> dict[str, Tensor]:
    """Find every wanted parameter (name -> shape) among those that a checkpoint holds, by name.

    `aliases` lists the other names of tied parameters. UnsupportedError names all that is missing or misshapen.
    """
    found: dict[str, Tensor] = {}
    problems = []
    for name, shape in wanted.items():
        names = [n for n in (name, *aliases.get(name, ())) if n in held]
        if not names:
            problems.append(f"{name} {list(shape)} is missing")
            continue
        tensor = held[names[0]]
        if tensor.shape != shape:
            problems.append(f"{name} is {list(tensor.shape)}, expected {list(shape)}")
        elif tensor.dtype not in ("F32", "F16", "BF16", "F64"):
            problems.append(f"{name} is stored as {tensor.dtype}, which no quantization_config explains")
        else:
            found[name] = tensor
    if problems:
        more = f"\n  ... and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise UnsupportedError(f"{folder} does not hold the model that its config.json describes:\n  "
                               + "\n  ".join(problems[:20]) + more)
    return found


def legacy_name(key: str) -> str:
    """Names of norms that old checkpoints use."""
    return re.sub(r"\.beta$", ".bias", re.sub(r"\.gamma$", ".weight", key))
