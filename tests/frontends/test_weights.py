"""Reading safetensors: damaged files are refused, whatever is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from inferloom.compiler.frontends.weights import read_checkpoint, read_header
from inferloom.ir.errors import UnsupportedError


def write(path: Path, header: dict, data: bytes = b"", length: int | None = None) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def test_reads_every_stored_type(tmp_path: Path) -> None:
    data = np.arange(6, dtype=np.float32)
    header = {"__metadata__": {"format": "pt"},
              "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
              "b": {"dtype": "BF16", "shape": [6], "data_offsets": [24, 36]},
              "empty": {"dtype": "F16", "shape": [0, 4], "data_offsets": [36, 36]}}
    path = write(tmp_path / "model.safetensors", header, data.tobytes() + data.astype(ml_dtypes.bfloat16).tobytes())
    found = read_checkpoint(tmp_path)
    assert found.keys() == {"a", "b", "empty"} and read_header(path).keys() == found.keys()
    assert np.array_equal(found["a"].read(), data.reshape(2, 3))
    assert found["b"].read().dtype == ml_dtypes.bfloat16 and np.array_equal(found["b"].read().astype(np.float32), data)
    assert found["empty"].read().shape == (0, 4)


@pytest.mark.parametrize("spec", [
    {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
    {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
    {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]},
    {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]},
    {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]},
    {"dtype": "F32", "shape": "x", "data_offsets": [0, 8]},
    {"dtype": "F32", "shape": [2]},
    "text",
])
def test_damaged_entries_are_refused(spec: object, tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", {"a": spec}, bytes(8))
    with pytest.raises(UnsupportedError, match="damaged safetensors header"):
        read_header(path)


@pytest.mark.parametrize("length", [0, 1 << 40, 10**6])
def test_header_lengths_outside_the_file_are_refused(length: int, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="not a safetensors file"):
        read_header(write(tmp_path / "x.safetensors", {}, b"", length))


def test_short_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"abc")
    with pytest.raises(UnsupportedError, match="not a safetensors file"):
        read_header(path)


@pytest.mark.parametrize(("shard", "message"), [("gone.safetensors", "lacks the shard"),
                                                ("../x.safetensors", "outside of the folder")])
def test_bad_shards_are_refused(shard: str, message: str, tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(UnsupportedError, match=message):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": [1]}'])
def test_damaged_indices_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UnsupportedError, match="is damaged"):
        read_checkpoint(tmp_path)
