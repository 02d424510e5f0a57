from dataclasses import fields, replace

import numpy as np
import pytest

from inferloom.runtime.artifact import Artifact
from inferloom.runtime.device.base import StepBatch, make_tiles
from inferloom.runtime.device.cpu import CpuDevice
from inferloom.runtime.errors import ArtifactError, RequestError
from inferloom.runtime.manifest import Tiles
from tests.runtime.toy import VOCAB, toy_library, toy_manifest, write_toy


def batch(**changes: object) -> StepBatch:
    """Two sequences, of 1 and 17 tokens, in blocks 2 and (0, 1); logits of their last tokens."""
    good = {"tokens": [3] + [1] * 17, "positions": [4, *range(17)], "slots": [[36, *range(17)]],
            "seq_starts": [0, 1, 18], "kv_lens": [5, 17], "block_tables": [[[2, -1], [0, 1]]], "logit_rows": [0, 17]}
    return StepBatch(**{k: v if isinstance(v, np.ndarray) else np.array(v, np.int32) for k, v in (good | changes).items()})


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Artifact:
    return write_toy(tmp_path_factory.mktemp("device") / "toy")


@pytest.fixture(params=[1, 3])
def device(artifact, request):
    with CpuDevice(artifact, num_blocks=3, threads=request.param) as device:
        yield device


def expected(rows: list[int], state: int, tiles: int) -> np.ndarray:
    return np.array(rows, np.float32)[:, None] * np.arange(VOCAB, dtype=np.float32) + state + 1000 * tiles


def test_step_runs_the_plan(device):
    # The toy's rows all sum the first sequence's first block: the one token it has stored so far.
    logits = device.step(batch())
    assert logits.dtype == np.float32 and logits.shape == (2, VOCAB)
    np.testing.assert_array_equal(logits, expected([3, 1], 3, 3))
    again = device.step(batch(tokens=[4] * 18, slots=[[37, *range(17)]], logit_rows=[0]))
    np.testing.assert_array_equal(again, expected([4], 7, 3))
    assert device.step(batch(logit_rows=np.zeros(0, np.int32))).shape == (0, VOCAB)


def test_many_steps_give_the_same(device):
    first = device.step(batch()).copy()
    for _ in range(300):
        np.testing.assert_array_equal(device.step(batch()), first)


def test_batches_of_one_layout_keep_the_rest(device, artifact):
    tables, layout = [[[2, 0], [0, 1]]], object()
    first = replace(batch(block_tables=tables), made=True, layout=layout)
    moved = replace(first, tokens=np.full(18, 4, np.int32), slots=np.array([[37, *range(17)]], np.int32),
                    kv_lens=np.array([6, 17], np.int32))
    other = batch(block_tables=[[[1, 0], [0, 2]]], slots=[[20, *range(16), 32]], logit_rows=[17])
    with CpuDevice(artifact, num_blocks=3, threads=1) as fresh:
        for step in (first, moved, moved, other, moved, first):
            np.testing.assert_array_equal(device.step(step), fresh.step(replace(step, layout=None)))
    with pytest.raises(RequestError, match="tokens"):
        device.step(replace(first, tokens=np.full(18, 99, np.int32)))
    with pytest.raises(RequestError, match="slots"):
        device.step(replace(first, slots=first.slots + 48))


def test_profile_names_each_call(device):
    assert [symbol for symbol, _ in device.profile(batch())] == ["store", "logits"]
    assert all(ns >= 0 for _, ns in device.profile(batch()))


def test_blocks(device):
    device.step(batch())
    assert np.frombuffer(device.read_block(0), np.int32).tolist() == [1] * 16
    assert np.frombuffer(device.read_block(2), np.int32).tolist() == [0] * 4 + [3] + [0] * 11
    device.copy_blocks([(2, 1), (1, 0)])
    assert device.read_block(0) == device.read_block(1) == device.read_block(2)
    device.write_block(1, bytes(range(64)))
    assert device.read_block(1) == bytes(range(64))
    for call in (lambda: device.read_block(3), lambda: device.copy_blocks([(0, -1)]),
                 lambda: device.write_block(3, bytes(64))):
        with pytest.raises(RequestError, match="does not exist"):
            call()
    with pytest.raises(RequestError, match="64 bytes, got 3"):
        device.write_block(0, b"abc")


def test_q_tiles():
    starts = np.array([0, 1, 17, 34, 66], np.int32)
    tiles, rest = make_tiles(starts, Tiles(16, 0))
    assert tiles.dtype == rest.dtype == np.int32 and rest.shape == (0, 3)
    assert tiles.tolist() == [[0, 0, 1], [1, 1, 16], [2, 17, 16], [2, 33, 1], [3, 34, 16], [3, 50, 16]]


@pytest.mark.parametrize("name", [f.name for f in fields(StepBatch)
                                  if f.name not in ("sharpness", "pages", "facts", "made", "layout")])
def test_arrays_must_be_plain_int32(device, name):
    good = getattr(batch(), name)
    for bad in (good.astype(np.int64), good[..., None], good.tolist()):
        with pytest.raises(RequestError, match=f"{name} must be an int32 array"):
            device.step(replace(batch(), **{name: bad}))
    with pytest.raises(RequestError, match="C-contiguous"):
        device.step(replace(batch(), **{name: np.repeat(good, 2, axis=-1)[..., ::2]}))


def test_sharpness_belongs_to_rows(device):
    for bad in (np.ones(2), np.ones(9, np.float32)):
        with pytest.raises(RequestError, match="one number for each row"):
            device.step(replace(batch(), sharpness=bad))


@pytest.mark.parametrize("changes, message", [
    ({"tokens": np.zeros(0, np.int32)}, "number of tokens must be 1 to 64, got 0"),
    ({"tokens": [0] * 65}, "number of tokens must be 1 to 64, got 65"),
    ({"tokens": [0] * 17}, "must have 17 entries"),
    ({"tokens": [5] * 18}, "tokens must be 0 to 4"),
    ({"tokens": [-1] * 18}, "tokens must be 0 to 4"),
    ({"positions": [0] * 17}, "positions must have 18"),
    ({"positions": [4, *range(16), 32]}, "positions must be 0 to 31"),
    ({"positions": [5, *range(17)]}, "below its sequence's kv_lens"),
    ({"slots": [[0] * 19]}, r"slots must be \(1, 18\)"),
    ({"slots": [[48] * 18]}, "slots must be 0 to 47"),
    ({"slots": [[-1] * 18]}, "slots must be 0 to 47"),
    ({"seq_starts": [0, 18]}, "seq_starts must have 3"),
    ({"seq_starts": [1, 2, 18]}, "rise from 0 to 18"),
    ({"seq_starts": [0, 1, 17]}, "rise from 0 to 18"),
    ({"seq_starts": [0, 0, 18]}, "rise from 0 to 18"),
    ({"seq_starts": [0, 19, 18]}, "rise from 0 to 18"),
    ({"kv_lens": [5, 16]}, "kv_lens counts"),
    ({"kv_lens": [5, 33]}, "kv_lens must be 0 to 32"),
    ({"kv_lens": [1] * 5}, "number of sequences must be 1 to 4"),
    ({"block_tables": [[[0, 1]]]}, r"block_tables must be \(1, 2, 2\)"),
    ({"block_tables": [[[0, 1, 2]] * 2]}, "width of block_tables must be 1 to 2"),
    ({"block_tables": [[[0], [1]]]}, "kv_lens must be 0 to 16"),
    ({"block_tables": [[[3, 0], [0, 1]]]}, "block_tables must be 0 to 2"),
    ({"block_tables": [[[2, 0], [0, -1]]]}, "block_tables must be 0 to 2"),
    ({"logit_rows": [18]}, "logit_rows must be 0 to 17"),
    ({"logit_rows": [0] * 5}, "number of logit rows must be 0 to 4"),
])
def test_batches_out_of_bounds(device, changes, message):
    with pytest.raises(RequestError, match=message):
        device.step(batch(**changes))


@pytest.mark.parametrize("name, value", [("tokens", 5), ("positions", 32), ("slots", 48), ("block_tables", 3),
                                         ("block_tables", -1), ("slots", -1)])
def test_places_are_checked_in_batches_of_the_engine_too(device, name, value):
    good = replace(batch(block_tables=[[[2, 0], [0, 1]]]), made=True)
    np.testing.assert_array_equal(device.step(good), expected([3, 1], 3, 3))
    bad = getattr(good, name).copy()
    bad.flat[-1] = value
    with pytest.raises(RequestError, match=f"{name} must be 0 to"):
        device.step(replace(good, **{name: bad}))


def test_memory_is_planned_and_refused_with_arithmetic(artifact):
    memory = artifact.manifest.memory
    fixed = 192 + memory.workspace + memory.inputs
    with CpuDevice(artifact, memory_bytes=fixed + 5 * 64 + 63, threads=1) as device:
        assert device.num_blocks == 5
    with pytest.raises(ArtifactError, match=f"needs {fixed + 64:,} bytes .* given {fixed + 63:,}: weights 192 \\+ "
                                            "workspace 256"):
        CpuDevice(artifact, memory_bytes=fixed + 63)
    for wrong in ({}, {"num_blocks": 1, "memory_bytes": 1}):
        with pytest.raises(RequestError, match="either num_blocks or memory_bytes"):
            CpuDevice(artifact, **wrong)
    for count in (0, 2**31 // 16):
        with pytest.raises(RequestError, match="num_blocks"):
            CpuDevice(artifact, num_blocks=count)
    for threads in (0, 257):
        with pytest.raises(RequestError, match="threads"):
            CpuDevice(artifact, num_blocks=1, threads=threads)


def test_two_devices_and_closing(artifact):
    first, second = CpuDevice(artifact, num_blocks=3, threads=2), CpuDevice(artifact, num_blocks=3, threads=1)
    logits = first.step(batch())
    kept = logits.copy()
    first.close()
    first.close()
    np.testing.assert_array_equal(logits, kept)  # the array keeps its memory
    np.testing.assert_array_equal(second.step(batch()), kept)
    for call in (lambda: first.step(batch()), lambda: first.read_block(0), lambda: first.profile(batch())):
        with pytest.raises(RequestError, match="closed"):
            call()
    second.close()
    with CpuDevice(artifact, num_blocks=3) as third:
        np.testing.assert_array_equal(third.step(batch()), kept)


def test_pinned_threads_run_the_plan(artifact, tmp_path):
    with CpuDevice(artifact, num_blocks=3, threads=3, pin=True) as device:
        np.testing.assert_array_equal(device.step(batch()), expected([3, 1], 3, 3))
    write_toy(tmp_path / "older", toy_library().replace(b"il_pin", b"il_nip"))
    with pytest.raises(ArtifactError, match="no function 'il_pin': compile the model again"):
        CpuDevice(Artifact.open(tmp_path / "older"), num_blocks=3, pin=True)


def test_libraries_that_do_not_fit(tmp_path):
    write_toy(tmp_path / "junk", b"\x7fELF")
    with pytest.raises(ArtifactError, match="cannot be loaded"):
        CpuDevice(Artifact.open(tmp_path / "junk"), num_blocks=1)
    kernels = toy_manifest()["kernels"]
    kernels[0]["symbol"] = "nowhere"
    write_toy(tmp_path / "missing", changes={"kernels": kernels})
    with pytest.raises(ArtifactError, match="no function 'nowhere'"):
        CpuDevice(Artifact.open(tmp_path / "missing"), num_blocks=1)


def test_other_abi_is_refused(tmp_path, monkeypatch):
    from inferloom.runtime.device import library

    monkeypatch.setattr(library, "ABI", 9)
    with pytest.raises(ArtifactError, match="has ABI 2, this runtime has 9"):
        library.KernelLibrary(toy_library(), "toy")


def test_private_file_where_there_is_no_memfd(artifact, monkeypatch):
    import os

    def refuse(*_: object) -> int:
        raise OSError("no memfd")

    monkeypatch.setattr(os, "memfd_create", refuse)
    with CpuDevice(artifact, num_blocks=3, threads=1) as device:
        np.testing.assert_array_equal(device.step(batch()), expected([3, 1], 3, 3))


def test_damaged_kernels_are_never_loaded(tmp_path):
    artifact = write_toy(tmp_path / "toy")
    path = tmp_path / "toy/kernels/kernels.so"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="damaged"):
        CpuDevice(artifact, num_blocks=1)
