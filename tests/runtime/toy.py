"""A complete artifact of two toy kernels, compiled with the system's C compiler."""

import platform
import shutil
import subprocess
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from inferloom.runtime import safetensors
from inferloom.runtime.artifact import Artifact, seal
from inferloom.runtime.manifest import Manifest, inputs_layout

VOCAB, LD, ROWS = 5, 16, 4
KERNELS = """
#include <stdint.h>
#define REST void *a5, void *a6, void *a7, void *a8, void *a9, void *a10, void *a11, void *a12, void *a13, \\
    void *a14, void *a15, const int32_t *dims, int32_t chunk
// The state keeps each token's id in its slot.
void store(int32_t *state, const int32_t *tokens, const int32_t *slots, void *a3, void *a4, REST) {
  state[slots[chunk]] = tokens[chunk];
}
// logits[r][v] = w[v] * token + the sum of what the state holds for the row's block + 1000 * tiles
void logits(float *out, const float *w, const int32_t *tokens, const int32_t *rows, int32_t *table, REST) {
  const int32_t *state = a5;
  for (int v = 0; v < 5; v++) {
    float sum = w[v] * tokens[rows[chunk]] + 1000.0f * dims[3];
    for (int i = 0; i < 16; i++) sum += state[table[0] * 16 + i];
    out[chunk * 16 + v] = sum;
  }
}
"""


@cache
def toy_library() -> bytes:
    """The toy kernels and the stepper, as a shared library; skips the test without a C compiler."""
    import tempfile

    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    stepper = Path(__file__).parents[2] / "targets" / "tvm" / "stepper.c"
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "toy.c", Path(folder) / "toy.so"
        source.write_text(KERNELS)
        subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-pthread", "-o", library, source, stepper], check=True)
        return library.read_bytes()


def toy_manifest() -> dict:
    """The toy's manifest as JSON, its files table empty."""
    def arg(space: str, offset: int) -> dict:
        return {"space": space, "offset": offset}

    def named(name: str) -> dict:
        return {"space": "input", "name": name}

    manifest = {
        "schema": 3, "abi": 2, "versions": {"inferloom": "0.1.0"},
        "model": {"name": "toy", "architecture": "Toy", "vocab_size": VOCAB, "max_model_len": 32,
                  "eos_token_ids": [1], "bos_token_id": None, "dtype": "fp32"},
        "chip": {"name": "any", "triple": f"{platform.machine()}-linux-gnu", "features": [], "driver": "none",
                 "arch": ""},
        "dims": {"tokens": 64, "seqs": 4, "rows": ROWS, "blocks_per_seq": 2},
        "tiles": {"prefill": 16, "decode": 0},
        "state": {"block_tokens": 16, "bytes_per_block": 64, "groups": [
            {"kind": "paged_kv", "window": 0, "tables": 1, "layers": [
                {"table": 0, "offset": 0, "bytes": 64, "dtype": "f32", "shape": [1, 1, 0]}]}]},
        "memory": {"weights": 64, "workspace": ROWS * LD * 4, "inputs": 0, "bytes_per_block": 64},
        "output": {"name": "logits", "offset": 0, "ld": LD, "vocab": VOCAB, "top": None},
        "kernels": [
            {"symbol": "store", "kind": "kv_write", "source": ["toy.py:1"], "grid": {"dim": 0, "tile": 1, "mult": 1},
             "launch": None, "resources": {}},
            {"symbol": "logits", "kind": "matmul", "source": [], "grid": {"dim": 2, "tile": 1, "mult": 1},
             "launch": None, "resources": {}}],
        "plan": [
            {"kernel": 0, "args": [arg("state", 0), named("tokens"), named("slots")]},
            {"kernel": 1, "args": [arg("workspace", 0), arg("weights", 0), named("tokens"), named("logit_rows"),
                                   named("block_tables"), arg("state", 0)]}],
        "weights": {"file": "weights/model.safetensors", "data_offset": 128, "bytes": 64},
        "numerics": {"accumulate": "f32", "order": "k-sequential"},
        "files": {},
    }
    filled = Manifest.from_json(manifest | {"memory": manifest["memory"] | {"inputs": 1 << 20}})
    manifest["memory"]["inputs"] = inputs_layout(filled.dims, filled.tiles, filled.state)[1]
    return manifest


def write_toy(folder: Path, library: bytes | None = None, changes: dict | None = None) -> Artifact:
    """Seal a toy artifact in `folder`; `changes` replace top-level keys of the manifest."""
    (folder / "kernels").mkdir(parents=True)
    (folder / "weights").mkdir()
    (folder / "tokenizer").mkdir()
    (folder / "kernels" / "kernels.so").write_bytes(library if library is not None else toy_library())
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    weights = np.zeros(16, np.float32)
    weights[:VOCAB] = np.arange(VOCAB)
    header = safetensors.write(folder / "weights" / "model.safetensors", [("scale", "F32", (16,))], [weights.tobytes()])
    assert header.data_offset == 128
    return seal(folder, Manifest.from_json(toy_manifest() | (changes or {})))
