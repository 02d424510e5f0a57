import copy
import json

import pytest

from inferloom.runtime import manifest as manifests
from inferloom.runtime.errors import ArtifactError
from inferloom.runtime.manifest import Manifest
from tests.runtime.toy import toy_manifest


def changed(path: str, value: object = ..., drop: bool = False) -> dict:
    data = copy.deepcopy(toy_manifest())
    *way, last = path.split(".")
    at = data
    for key in way:
        at = at[int(key) if isinstance(at, list) else key]
    if drop:
        del at[last]
    else:
        at[int(last) if isinstance(at, list) else last] = value
    return data


def test_round_trip_and_canonical_bytes():
    manifest = Manifest.from_json(toy_manifest())
    assert manifest.to_json() == toy_manifest()
    data = manifests.dumps(manifest)
    assert data == (json.dumps(toy_manifest(), sort_keys=True, indent=1) + "\n").encode()
    assert manifests.loads(data) == manifest


def paths(value: object, path: str = "") -> list[str]:
    if isinstance(value, dict):
        found = [f"{path}{k}" for k in value]
        return found + [p for k, v in value.items() for p in paths(v, f"{path}{k}.")]
    if isinstance(value, list):
        return [p for i, v in enumerate(value) for p in paths(v, f"{path}{i}.")]
    return []


FREE = ("versions.", "numerics.", "files.")
KEYS = [p for p in paths(toy_manifest()) if not p.startswith(FREE)]


@pytest.mark.parametrize("path", KEYS)
def test_every_key_is_required_and_typed(path):
    shown = "".join(f"[{p}]" if p.isdigit() else f".{p}" for p in path.split("."))
    with pytest.raises(ArtifactError) as caught:
        Manifest.from_json(changed(path, drop=True))
    # An argument without offset or name is an error of the argument.
    assert f"manifest{shown}" in str(caught.value) or ".args[" in str(caught.value)
    with pytest.raises(ArtifactError) as caught:
        Manifest.from_json(changed(path, 1.5))
    assert f"manifest{shown} must be" in str(caught.value)


@pytest.mark.parametrize("path, value, message", [
    ("more", 1, r"manifest\.more is not a known key"),
    ("output.more", 1, r"manifest\.output\.more is not a known key"),
    ("plan.0.args.0.more", 1, r"manifest\.plan\[0\]\.args\[0\]\.more"),
    ("schema", 1, "schema is 1, but this runtime reads schema 3"),
    ("abi", 9, "abi is 9"),
    ("dims.tokens", True, "dims.tokens must be an integer"),
    ("dims.tokens", 0, "dims.tokens must be between 1"),
    ("dims.blocks_per_seq", 2**30, "below"),
    ("model.dtype", "fp8", "one of 'fp32', 'fp16', 'bf16'"),
    ("model.vocab_size", 0, "must be positive"),
    ("model.eos_token_ids", ["x"], r"eos_token_ids\[0\] must be an integer"),
    ("state.block_tokens", 24, "multiple of 16"),
    ("state.bytes_per_block", 32, "equal memory.bytes_per_block"),
    ("memory.workspace", -1, "must not be negative"),
    ("memory.workspace", 8, "leave memory.workspace"),
    ("memory.inputs", 8, "step inputs of these dims take"),
    ("weights.data_offset", 65, "multiple of 64"),
    ("weights.bytes", -1, "must not be negative"),
    ("output.ld", 2, "1 <= vocab <= ld"),
    ("kernels.0.grid.tile", 0, "tile >= 1"),
    ("kernels.0.grid.dim", 5, "dim in -1..4"),
    ("kernels.0.grid.mult", 2**31, "32 bits"),
    ("plan.0.kernel", 2, "there are 2 kernels"),
    ("plan.0.args", [{"space": "state", "offset": 0}] * 25, "at most 24"),
    ("plan.0.args.0", {"space": "state"}, "either an offset or a name"),
    ("plan.0.args.0", {"space": "input", "offset": 0, "name": "slots"}, "either an offset or a name"),
    ("plan.0.args.0", {"space": "state", "name": "slots"}, "only with space 'input'"),
    ("plan.0.args.0", {"space": "state", "offset": 65}, "outside the 64 bytes of state"),
    ("plan.0.args.0", {"space": "weights", "offset": -1}, "outside"),
    ("plan.0.args.0", {"space": "input", "name": "logits"}, "no step input; there are: dims, "),
    ("plan.0.args.0", {"space": "heap", "offset": 0}, "one of 'workspace'"),
])
def test_refusals(path, value, message):
    with pytest.raises(ArtifactError, match=message):
        Manifest.from_json(changed(path, value))


@pytest.mark.parametrize("data", [b"", b"[", b"\xff", b"[" * 100_000, b"[]", b"null",
                                  json.dumps(toy_manifest()).encode()])
def test_only_canonical_json_is_read(data):
    with pytest.raises(ArtifactError):
        manifests.loads(data)
