import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from inferloom.runtime.artifact import Artifact
from inferloom.runtime.device.base import StepBatch
from inferloom.runtime.device.gpu import GpuDevice
from inferloom.runtime.device.launcher import GpuError, Launch, Launcher
from inferloom.runtime.errors import ArtifactError, RequestError
from inferloom.runtime.manifest import Dims, inputs_layout
from inferloom.runtime.top import TopRows
from tests.runtime import toy_gpu
from tests.runtime.toy import toy_library
from tests.runtime.toy_gpu import LD, ROWS, SEQS, VOCAB, WIDTH, Mock, toy_manifest, write_toy

BLOCKS = 30


@pytest.fixture(scope="module", params=["cuda", "hip"])
def artifact(tmp_path_factory, request) -> Artifact:
    return write_toy(tmp_path_factory.mktemp("gpu") / "toy", request.param)


@pytest.fixture
def mock(artifact):
    made = toy_gpu.mock(artifact.manifest.chip.driver)
    yield made
    assert not made.errors
    made.reset()


@pytest.fixture
def device(artifact, mock):
    with GpuDevice(artifact, num_blocks=BLOCKS) as device:
        yield device


def decode(seqs: int, rows: int | None = None, first: int = 1, kv: int = 1) -> StepBatch:
    """One token for each of so many sequences: sequence i has token (first + i) % VOCAB at kv - 1 in blocks 2i, 2i+1."""
    rows = min(seqs, ROWS) if rows is None else rows
    i = np.arange(seqs, dtype=np.int32)
    return StepBatch((first + i) % VOCAB, i * 0 + kv - 1, 32 * i[None] + kv - 1, np.arange(seqs + 1, dtype=np.int32), i * 0 + kv,
                     np.stack([2 * i, 2 * i + 1], 1)[None], i[::-1][:rows].copy())


def mixed() -> StepBatch:
    """Sequences of 1, 2 and 20 new tokens, in blocks 2, 5 and (0, 1); what block_tables hold beyond is junk."""
    return StepBatch(*(np.array(a, np.int32) for a in (
        [3, 2, 4] + [1] * 20, [0, 0, 1, *range(20)], [[32, 80, 81, *range(20)]], [0, 1, 3, 23], [1, 2, 20],
        [[[2, -1], [5, 99], [0, 1]]], [22, 0, 2])))


def expected(rows: list[tuple[int, int]], q_tokens: int, d_tokens: int) -> np.ndarray:
    """Rows of (token, sum of its sequence's state)."""
    tokens, sums = np.array(rows, np.float32).reshape(-1, 2).T
    return tokens[:, None] * np.arange(VOCAB, dtype=np.float32) + sums[:, None] + 1000 * q_tokens + 100_000 * d_tokens


def decoded(batch: StepBatch) -> np.ndarray:
    tokens = [int(batch.tokens[r]) for r in batch.logit_rows]
    return expected([(t, t) for t in tokens], 0, len(batch.tokens))


def layout_of(artifact: Artifact) -> dict[str, int]:
    m = artifact.manifest
    return {k: v[0] for k, v in inputs_layout(m.dims, m.tiles, m.state)[0].items()}


def test_a_step_runs_the_plan_in_order(device, mock):
    logits = device.step(mixed())
    assert logits.dtype == np.float32 and logits.shape == (3, VOCAB)
    np.testing.assert_array_equal(logits, expected([(1, 20), (3, 3), (4, 6)], 20, 3))
    shared = toy_manifest(mock.driver)["kernels"][5]["launch"]["shared"]
    assert [(c.name, c.grid, c.block, c.shared) for c in mock.log] == [
        ("store", 6, 128, 0), ("clear", 3, 128, 0), ("prefill", 2, 128, 0), ("decode", 2, 128, 0), ("many", 6, 256, shared)]
    np.testing.assert_array_equal(device.step(replace(mixed(), logit_rows=np.array([0], np.int32))),
                                  expected([(3, 3)], 20, 3))
    assert [c.name for c in mock.log[5:]] == ["store", "clear", "prefill", "decode", "few"]
    assert device.step(replace(mixed(), logit_rows=np.zeros(0, np.int32))).shape == (0, VOCAB)
    assert [c.name for c in mock.log[10:]] == ["store", "clear", "prefill", "decode"]  # none for no rows


def test_arguments_are_pointers_in_order_then_two_zeros(device, artifact, mock):
    device.step(mixed())
    calls = {c.name: c.params for c in mock.log}
    at = layout_of(artifact)
    state, tokens, _, dims, *_ = calls["store"]
    inputs = dims - at["dims"]
    workspace, weights = calls["many"][:2]
    assert calls["store"] == [state, inputs + at["tokens"], inputs + at["slots"], dims, 0, 0]
    assert calls["clear"] == [workspace + ROWS * LD * 4, 0, 0]
    assert calls["decode"] == [workspace + ROWS * LD * 4 + 4, inputs + at["d_tiles"], dims, 0, 0]
    assert calls["many"] == [workspace, weights, tokens, inputs + at["logit_rows"], inputs + at["block_tables"], state,
                             inputs + at["seq_starts"], inputs + at["kv_lens"], workspace + ROWS * LD * 4, dims, 0, 0]
    assert len({workspace, weights, state, inputs}) == 4 and all(p % 256 == 0 for p in (workspace, weights, state, inputs))
    for call in artifact.manifest.plan:
        symbol = artifact.manifest.kernels[call.kernel].symbol
        assert mock.parameters(symbol) == [8] * (len(call.args) + 2)


def test_a_step_makes_two_uploads_and_one_download(device, mock):
    up, down, sync = (mock.name(*names) for names in (
        ("cuMemcpyHtoDAsync_v2", "hipMemcpyHtoDAsync"), ("cuMemcpyDtoHAsync_v2", "hipMemcpyDtoHAsync"),
        ("cuStreamSynchronize", "hipStreamSynchronize")))
    for batch in (mixed(), decode(5)):
        before = [mock.calls(name) for name in (up, down, sync)]
        device.step(batch)
        assert [mock.calls(name) - n for name, n in zip((up, down, sync), before)] == [2, 1, 1]
    assert mock.lib.mock_pageable() == 0  # everything goes through pinned memory


def test_graphs_are_recorded_once_a_bucket(device, mock):
    instantiate = mock.name("cuGraphInstantiateWithFlags", "hipGraphInstantiateWithFlags")
    launch = mock.name("cuLaunchKernel", "hipModuleLaunchKernel")
    assert mock.calls(instantiate) == 0  # none before it is needed
    made, recorded = [], {}
    for seqs in (1, 2, 3, 4, 5, 8, 7, 12, 9, 3, 1):
        mock.log.clear()
        batch = decode(seqs)
        np.testing.assert_array_equal(device.step(batch), decoded(batch))
        made.append(mock.calls(instantiate))
        recorded[seqs] = [(c.name, c.grid) for c in mock.log]
    assert made == [1, 2, 3, 3, 4, 4, 4, 5, 5, 5, 5]
    # Launches are those of the bucket's counts: of 4 and of the artifact's 12 sequences, with 6 rows at most.
    assert recorded[3] == [("store", 1), ("clear", 3), ("decode", 4), ("many", 8)]
    assert recorded[9] == [("store", 3), ("clear", 3), ("decode", 12), ("many", 12)]
    before = mock.calls(launch)
    device.step(decode(3))
    assert mock.calls(launch) == before  # a replay launches nothing from here


def test_at_most_eight_graphs(tmp_path, artifact):
    mock = toy_gpu.mock(artifact.manifest.chip.driver)
    mock.run({})
    driver = artifact.manifest.chip.driver
    dims = Dims(256, 256, ROWS, 2)
    memory = toy_manifest(driver)["memory"] | {"inputs": inputs_layout(dims, artifact.manifest.tiles, artifact.manifest.state)[1]}
    toy = write_toy(tmp_path / "toy", driver, changes={"memory": memory, "dims": {
        "tokens": 256, "seqs": 256, "rows": ROWS, "blocks_per_seq": 2}})
    with GpuDevice(toy, num_blocks=512) as device:
        for seqs in range(1, 257):
            device.step(decode(seqs))
        assert sorted(device._recorded) == [1, 2, 4, 8, 16, 32, 64, 256]
    assert mock.calls(mock.name("cuGraphInstantiateWithFlags", "hipGraphInstantiateWithFlags")) == 8


def test_replayed_and_direct_steps_agree(artifact, mock):
    with GpuDevice(artifact, num_blocks=BLOCKS) as graphs, GpuDevice(artifact, num_blocks=BLOCKS, graphs=False) as direct:
        for seqs in range(1, SEQS + 1):
            for rows in {0, 1, min(seqs, ROWS)}:
                batch = decode(seqs, rows, first=seqs)
                np.testing.assert_array_equal(graphs.step(batch), direct.step(batch))
        for block in range(BLOCKS):
            assert graphs.read_block(block) == direct.read_block(block)
        assert len(graphs._recorded) == 5 and not direct._recorded


def test_steps_that_no_graph_can_do(device):
    wide = replace(decode(2), logit_rows=np.array([0, 1, 0, 1], np.int32))  # more rows than a graph of 2 has
    np.testing.assert_array_equal(device.step(wide), expected([(1, 1), (2, 2)] * 2, 0, 2))
    two = StepBatch(*(np.array(a, np.int32) for a in ([1, 2], [0, 1], [[0, 1]], [0, 2], [2], [[[0, 1]]], [1])))
    np.testing.assert_array_equal(device.step(two), expected([(2, 3)], 0, 2))  # two tokens of one sequence
    device.step(mixed())
    assert not device._recorded


def test_no_graphs_where_decoding_is_cut_into_tiles_too(tmp_path, mock):
    changes = {"tiles": {"prefill": 16, "decode": 0}}
    with GpuDevice(write_toy(tmp_path / "toy", mock.driver, changes=changes), num_blocks=BLOCKS) as device:
        np.testing.assert_array_equal(device.step(decode(3)), expected([(3, 3), (2, 2), (1, 1)], 3, 0))
        assert not device._recorded


def test_many_steps_in_another_thread(device):
    results: list[np.ndarray] = []

    def work() -> None:
        for i in range(20):
            results.append(device.step(decode(1 + i % SEQS)).copy())
            results.append(device.step(mixed()).copy())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    for i in range(20):
        np.testing.assert_array_equal(results[2 * i], decoded(decode(1 + i % SEQS)))
        np.testing.assert_array_equal(results[2 * i + 1], expected([(1, 20), (3, 3), (4, 6)], 20, 3))


def test_every_function_works_in_any_thread(artifact, mock):
    source = artifact.read("kernels/clear" + mock.name(".cubin", ".hsaco"))
    gpu = Launcher(toy_gpu.launcher(), "launcher", mock.driver, 0)

    def alone(work: Callable[..., Any], *args: Any) -> Any:
        """In a thread that has done nothing before."""
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(work, *args).result()

    assert alone(gpu.info).capability == (9, 0)
    function = alone(gpu.function, alone(gpu.module, source), "clear", 0)
    a, b, memory = alone(gpu.alloc, 64), alone(gpu.alloc, 64), alone(gpu.pinned, 64)
    memory[:] = 7
    alone(gpu.upload, a, memory.ctypes.data, 64)
    alone(gpu.copy, b, a, 64)
    alone(gpu.zero, a, 64)
    launches = (Launch * 1)(Launch(function=function, nargs=1, dim=-1, tile=1, mult=1, threads=32))
    launches[0].args[0] = b + 8
    dims = [1, 1, 1, 0, 1]
    alone(gpu.step, launches, dims)
    alone(gpu.download, memory.ctypes.data, b, 64)
    alone(gpu.sync)
    assert memory.tolist() == [7] * 8 + [0] * 8 + [7] * 48
    graph = alone(gpu.capture, launches, dims)
    alone(gpu.replay, graph)
    assert alone(gpu.time, launches, dims) == [1000.0]
    alone(gpu.drop, graph)
    assert [c.name for c in mock.log] == ["clear"] * 3
    alone(gpu.free, a)
    alone(gpu.free, b)


def test_profile_times_each_call(device, mock):
    times = device.profile(mixed())
    # The mock's kernels take a millisecond a block.
    assert times == [("store", 6_000_000), ("clear", 3_000_000), ("prefill", 2_000_000), ("decode", 2_000_000),
                     ("few", 0), ("many", 6_000_000)]
    assert mock.calls(mock.name("cuEventDestroy_v2", "hipEventDestroy")) == 7


def test_the_largest_logits_of_each_row(tmp_path, mock):
    toy = write_toy(tmp_path / "toy", mock.driver, changes=toy_manifest(mock.driver, top=True))
    sharpness = np.array([1, 0.5, 2], np.float32)
    down = mock.name("cuMemcpyDtoHAsync_v2", "hipMemcpyDtoHAsync")
    with GpuDevice(toy, num_blocks=BLOCKS) as device:
        rows = device.step(replace(mixed(), sharpness=sharpness))
        assert isinstance(rows, TopRows) and len(rows) == 3 and mock.calls(down) == 1
        wanted = expected([(1, 20), (3, 3), (4, 6)], 20, 3)
        for row, logits, sharp in zip(rows, wanted, sharpness):
            assert row.ids.tolist() == [4, 3, 2] and row.values.tolist() == logits[[4, 3, 2]].tolist()
            assert row.log_sum == pytest.approx(np.logaddexp.reduce((logits.astype(np.float64) - logits.max()) * sharp), abs=1e-6)
        last, first = rows[2].row(), rows[0].row()
        np.testing.assert_array_equal([first, last], wanted[[0, 2]])  # one fetch leaves the other's row alone
        np.testing.assert_array_equal(np.asarray(rows), wanted)
        replayed = device.step(decode(5))
        np.testing.assert_array_equal(np.asarray(replayed), decoded(decode(5)))
        assert device._recorded and mock.lib.mock_pageable() == 0
        assert len(device.step(decode(1, rows=0))) == 0
        with pytest.raises(RequestError, match="gone after the next one"):
            replayed[0].row()
        rows = device.step(mixed())
    with pytest.raises(RequestError, match="closed"):
        rows[0].row()


def test_blocks(device):
    for block in range(BLOCKS):
        assert device.read_block(block) == bytes(64)  # the driver's memory comes full of junk
    device.step(mixed())
    assert np.frombuffer(device.read_block(0), np.int32).tolist() == [1] * 16
    assert np.frombuffer(device.read_block(5), np.int32).tolist() == [2, 4] + [0] * 14
    device.copy_blocks([(5, 1), (1, 0), (2, 2)])
    assert device.read_block(0) == device.read_block(1) == device.read_block(5)
    device.write_block(29, bytes(range(64)))
    assert device.read_block(29) == bytes(range(64)) and device.read_block(28) == bytes(64)
    for call in (lambda: device.read_block(BLOCKS), lambda: device.copy_blocks([(5, 3), (0, -1)]),
                 lambda: device.write_block(BLOCKS, bytes(64))):
        with pytest.raises(RequestError, match="does not exist"):
            call()
    assert device.read_block(3) == bytes(64)  # nothing was copied
    with pytest.raises(RequestError, match="64 bytes, got 3"):
        device.write_block(0, b"abc")


def test_batches_are_checked(device, mock):
    for name in (f.name for f in fields(StepBatch) if f.name not in ("sharpness", "made", "layout")):
        with pytest.raises(RequestError, match=f"{name} must be an int32 array"):
            device.step(replace(mixed(), **{name: getattr(mixed(), name).astype(np.int64)}))
    with pytest.raises(RequestError, match="slots must be 0 to"):
        device.profile(replace(mixed(), slots=mixed().slots + 16 * BLOCKS))
    assert mock.lib.mock_launched() == 0


def test_memory_is_planned_and_refused_with_arithmetic(artifact, mock):
    memory = artifact.manifest.memory
    fixed = 192 + memory.workspace + memory.inputs
    with GpuDevice(artifact, memory_bytes=fixed + 5 * 64 + 63) as device:
        assert device.num_blocks == 5
    with pytest.raises(ArtifactError, match=f"needs {fixed + 64:,} bytes .* given {fixed + 63:,}: weights 192 \\+ workspace"):
        GpuDevice(artifact, memory_bytes=fixed + 63)
    with pytest.raises(RequestError, match="either num_blocks or memory_bytes"):
        GpuDevice(artifact, num_blocks=1, memory_bytes=1)
    with GpuDevice(artifact) as device:  # all that its limits can use
        assert device.num_blocks == SEQS * WIDTH
    with pytest.raises(RequestError, match="num_blocks"):
        GpuDevice(artifact, num_blocks=0)
    with pytest.raises(RequestError, match="ordinal=-1"):
        GpuDevice(artifact, num_blocks=1, ordinal=-1)
    mock.reset()
    mock.set("total", fixed + 4 * 64)
    with pytest.raises(ArtifactError, match=f"needs {fixed + 5 * 64:,} bytes of GPU memory, Mock GPU 0 has {fixed + 256:,} of "
                                            f".* free: weights 192 \\+ workspace .* \\+ 5 blocks of 16 tokens 320; end"):
        GpuDevice(artifact, num_blocks=5)
    assert mock.calls(mock.name("cuMemAlloc_v2", "hipMalloc")) == 0
    GpuDevice(artifact, num_blocks=4).close()


#: What each driver call is needed for, CUDA's name and HIP's; None: the other driver has nothing of the kind.
CALLS = [
    ("cuInit", "hipInit"), ("cuDeviceGet", "hipDeviceGet"), ("cuDeviceGetName", "hipDeviceGetName"),
    ("cuDeviceGetAttribute", "hipDeviceComputeCapability"), ("cuDevicePrimaryCtxRetain", None),
    ("cuCtxSetCurrent", "hipSetDevice"), ("cuMemGetInfo_v2", "hipMemGetInfo"),
    ("cuStreamCreate", "hipStreamCreateWithFlags"), ("cuStreamSynchronize", "hipStreamSynchronize"),
    ("cuModuleLoadData", "hipModuleLoadData"), ("cuModuleGetFunction", "hipModuleGetFunction"),
    ("cuFuncSetAttribute", None), ("cuMemAlloc_v2", "hipMalloc"), ("cuMemHostAlloc", "hipHostMalloc"),
    ("cuMemcpyHtoDAsync_v2", "hipMemcpyHtoDAsync"), ("cuMemcpyDtoHAsync_v2", "hipMemcpyDtoHAsync"),
    ("cuMemcpyDtoDAsync_v2", "hipMemcpyDtoDAsync"), ("cuMemsetD8Async", "hipMemsetD8Async"),
    ("cuLaunchKernel", "hipModuleLaunchKernel"), ("cuStreamBeginCapture_v2", "hipStreamBeginCapture"),
    ("cuStreamEndCapture", "hipStreamEndCapture"), ("cuGraphInstantiateWithFlags", "hipGraphInstantiateWithFlags"),
    ("cuGraphLaunch", "hipGraphLaunch"),
    ("cuEventCreate", "hipEventCreateWithFlags"), ("cuEventRecord", "hipEventRecord"),
    ("cuEventElapsedTime", "hipEventElapsedTime")]
#: In closing: nobody could do anything about their failure.
CLOSING = [
    ("cuStreamDestroy_v2", "hipStreamDestroy"), ("cuModuleUnload", "hipModuleUnload"), ("cuMemFree_v2", "hipFree"),
    ("cuMemFreeHost", "hipHostFree"), ("cuGraphDestroy", "hipGraphDestroy"), ("cuGraphExecDestroy", "hipGraphExecDestroy"),
    ("cuEventDestroy_v2", "hipEventDestroy"), ("cuDevicePrimaryCtxRelease_v2", None)]


def everything(artifact: Artifact) -> None:
    """Make every call of the driver that there is. A device lives on after a failure, as far as the driver lets it."""
    with GpuDevice(artifact, num_blocks=BLOCKS) as device:
        failure = None
        for work in (lambda: device.step(mixed()), lambda: device.step(decode(3)), lambda: device.profile(mixed()),
                     lambda: device.copy_blocks([(0, 1)]), lambda: device.write_block(1, device.read_block(0))):
            try:
                work()
            except GpuError as error:
                assert failure is None  # only one call fails
                failure = error
                work()
        np.testing.assert_array_equal(device.step(decode(3)), decoded(decode(3)))
        try:
            if failure is not None:
                raise failure
        finally:
            del failure  # which holds this frame, and with it the device


@pytest.mark.parametrize("names", CALLS, ids=lambda names: names[0])
def test_every_failure_names_the_call_and_says_what_to_do(artifact, mock, names):
    call, before = mock.name(*names), mock.live
    if call is None:
        pytest.skip("the driver has no such call")
    mock.fail(call, 700)
    with pytest.raises(ArtifactError, match=rf"GPU: {call}: error 700, mock error.*; \S.{{20}}"):
        everything(artifact)
    assert mock.live == before


@pytest.mark.parametrize("names", CLOSING, ids=lambda names: names[0])
def test_failures_of_closing_are_not_raised(artifact, mock, names):
    call, before = mock.name(*names), mock.live
    if call is None:
        pytest.skip("the driver has no such call")
    mock.fail(call, 700)
    everything(artifact)
    assert mock.calls(call) > 0 and mock.live == before + 1  # what was not given back


def test_everything_is_given_back(artifact, mock):
    before = mock.live
    everything(artifact)
    assert mock.live == before


def test_launch_errors_say_which(device, mock):
    sync = mock.name("cuStreamSynchronize", "hipStreamSynchronize")
    for batch in (mixed(), decode(5)):  # enqueued and recorded
        before = mock.calls(sync)
        mock.fail(mock.name("cuLaunchKernel", "hipModuleLaunchKernel"), 1)
        with pytest.raises(GpuError, match=r"error 1, invalid argument \(launch 0: \d blocks of 128 threads, 0 bytes"):
            device.step(batch)
        assert mock.calls(sync) == before + 1  # nobody reads the inputs any more
    np.testing.assert_array_equal(device.step(decode(5)), decoded(decode(5)))


def test_a_lost_gpu_can_be_closed(artifact, mock):
    device = GpuDevice(artifact, num_blocks=BLOCKS)
    device.step(decode(2))
    mock.set("broken", 719)
    for call in (lambda: device.step(mixed()), lambda: device.step(decode(2)), lambda: device.profile(mixed()),
                 lambda: device.read_block(0), lambda: device.write_block(0, bytes(64)),
                 lambda: device.copy_blocks([(0, 1)])):
        with pytest.raises(GpuError, match="error 719.*; close the device and open the artifact again"):
            call()
    device.close()
    mock.set("broken", 0)


def test_out_of_memory(artifact, mock):
    for call, advice in (((("cuMemAlloc_v2", "hipMalloc")), r"\(64 bytes\); free memory of the GPU"),
                         (("cuMemHostAlloc", "hipHostMalloc"), r"\(192 bytes\); free memory of this machine")):
        mock.fail(mock.name(*call), 2)
        with pytest.raises(GpuError, match=f"error 2, out of memory {advice}"):
            GpuDevice(artifact, num_blocks=1)


def test_no_such_gpu(artifact, mock):
    with pytest.raises(GpuError, match=r"error 101, invalid device ordinal \(GPU number 1\); is there"):
        GpuDevice(artifact, num_blocks=1, ordinal=1)
    mock.set("devices", 2)
    GpuDevice(artifact, num_blocks=1, ordinal=1).close()


def test_the_wrong_chip(artifact, mock, tmp_path):
    chip = toy_manifest(mock.driver)["chip"]
    if mock.driver == "cuda":
        mock.set("major", 10)
        with pytest.raises(ArtifactError, match=r"compiled for chip toy-gpu \(sm_90\), this GPU is Mock GPU 0 \(sm_100\): comp"):
            GpuDevice(artifact, num_blocks=1)
        assert mock.calls("cuModuleLoadData") == 0
        toy = write_toy(tmp_path / "other", "cuda", changes={"chip": chip | {"arch": "sm_100"}})
        GpuDevice(toy, num_blocks=1).close()
    else:
        mock.fail("hipModuleLoadData", 209)
        with pytest.raises(ArtifactError, match=r"compiled for chip toy-gpu \(gfx942\), this GPU is Mock GPU 0, which cannot "
                                                r"load it: compile for this GPU \(GPU: hipModuleLoadData: error 209, no"):
            GpuDevice(artifact, num_blocks=1)
    host = write_toy(tmp_path / "host", mock.driver, changes={"chip": chip | {"triple": "s390x-linux-gnu"}})
    with pytest.raises(ArtifactError, match="s390x"):
        GpuDevice(host, num_blocks=1)


def test_artifacts_that_are_not_for_a_gpu(tmp_path):
    from tests.runtime.toy import write_toy as write_cpu_toy

    with pytest.raises(ArtifactError, match="no GPU: compile for this GPU"):
        GpuDevice(write_cpu_toy(tmp_path / "toy"), num_blocks=1)


def test_libraries_that_do_not_fit(artifact, mock, tmp_path, monkeypatch):
    from inferloom.runtime.device import launcher

    with pytest.raises(ArtifactError, match="no function 'il_gpu_abi'"):
        GpuDevice(write_toy(tmp_path / "cpu", mock.driver, toy_library()), num_blocks=1)
    with pytest.raises(ArtifactError, match="cannot be loaded"):
        GpuDevice(write_toy(tmp_path / "junk", mock.driver, b"\x7fELF"), num_blocks=1)
    kernels = toy_manifest(mock.driver)["kernels"]
    kernels[0]["launch"]["file"] = kernels[1]["launch"]["file"]
    toy = write_toy(tmp_path / "other", mock.driver, changes={"kernels": kernels})
    with pytest.raises(GpuError, match=r"error 500, named symbol not found \(kernel store\); compile the model again"):
        GpuDevice(toy, num_blocks=1)
    kernels[0]["launch"]["file"] = "kernels/absent"
    with pytest.raises(ArtifactError, match="has no file 'kernels/absent'"):
        GpuDevice(Artifact(toy.path, replace(toy.manifest, kernels=tuple(
            replace(k, launch=replace(k.launch, file="kernels/absent")) for k in toy.manifest.kernels))), num_blocks=1)
    monkeypatch.setattr(launcher, "ABI", 9)
    with pytest.raises(ArtifactError, match="has ABI 1, this runtime has 9"):
        GpuDevice(artifact, num_blocks=1)


@pytest.mark.parametrize("name", ["weights/model.safetensors", "kernels/kernels.so", "kernels/decode"])
def test_damaged_files_are_refused_before_anything_runs(tmp_path, artifact, mock, name):
    toy = write_toy(tmp_path / "toy", mock.driver)
    name += mock.name(".cubin", ".hsaco") if name == "kernels/decode" else ""
    data = bytearray((toy.path / name).read_bytes())
    data[-1] ^= 1
    (toy.path / name).write_bytes(data)
    before = mock.live
    with pytest.raises(ArtifactError, match=f"{name} is damaged"):
        GpuDevice(toy, num_blocks=1)
    assert mock.calls(mock.name("cuLaunchKernel", "hipModuleLaunchKernel")) == 0 and mock.live == before


def test_weights_in_many_pieces(tmp_path, artifact, mock, monkeypatch):
    from inferloom.runtime.device import gpu

    monkeypatch.setattr(gpu, "CHUNK", 20)  # the header of 128 bytes and the data end within pieces
    with GpuDevice(artifact, num_blocks=BLOCKS) as device:
        np.testing.assert_array_equal(device.step(mixed()), expected([(1, 20), (3, 3), (4, 6)], 20, 3))
    toy = write_toy(tmp_path / "toy", mock.driver)
    path = toy.path / "weights/model.safetensors"
    data = path.read_bytes()
    for wrong in (data[:100], data[:-1], data[:60] + b"x" + data[61:]):
        path.write_bytes(wrong)
        with pytest.raises(ArtifactError, match="damaged|ends after"):
            GpuDevice(toy, num_blocks=1)
    path.write_bytes(data)
    for offset, message in ((64, "header ends early"), (192, "data section starts at 128")):
        moved = replace(toy.manifest, weights=replace(toy.manifest.weights, data_offset=offset, bytes=192 - offset))
        with pytest.raises(ArtifactError, match=message):
            GpuDevice(Artifact(toy.path, moved), num_blocks=1)


def test_two_devices_and_closing(artifact, mock):
    first, second = GpuDevice(artifact, num_blocks=BLOCKS), GpuDevice(artifact, num_blocks=BLOCKS)
    logits = first.step(mixed())
    kept, before = logits.copy(), mock.live
    first.close()
    first.close()
    np.testing.assert_array_equal(logits, kept)  # the array keeps its memory
    held = mock.live
    del logits
    assert before > held > mock.live
    np.testing.assert_array_equal(second.step(mixed()), kept)
    for call in (lambda: first.step(mixed()), lambda: first.read_block(0), lambda: first.profile(mixed()),
                 lambda: first.write_block(0, bytes(64)), lambda: first.copy_blocks([(0, 1)])):
        with pytest.raises(RequestError, match="closed"):
            call()
    second.close()


WITHOUT_DRIVER = """
import sys
from inferloom.runtime.device.launcher import Launcher
from inferloom.runtime.errors import ArtifactError
for driver in sys.argv[2:]:
    try:
        Launcher(open(sys.argv[1], "rb").read(), "launcher", driver, 0)
    except ArtifactError as error:
        print(error)
"""


def test_missing_and_old_drivers(tmp_path):
    library = tmp_path / "launcher.so"
    library.write_bytes(toy_gpu.launcher())
    (tmp_path / "none.c").write_text("int cuInit(unsigned flags) { return (int)flags; }\n")

    def said(*drivers: str) -> list[str]:
        env = os.environ | {"LD_LIBRARY_PATH": str(tmp_path), "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        done = subprocess.run([sys.executable, "-c", WITHOUT_DRIVER, library, *drivers], env=env, capture_output=True,
                              text=True, check=True)
        return done.stdout.splitlines()

    missing = said("cuda", "hip", "metal")
    if len(missing) < 3 or "cannot be loaded" not in "".join(missing[:1] + missing[1:2]):
        pytest.skip("this machine has a GPU's driver")
    assert "CUDA driver library libcuda.so.1 cannot be loaded" in missing[0] and "install the NVIDIA driver" in missing[0]
    assert "HIP driver library libamdhip64.so cannot be loaded" in missing[1] and "install ROCm" in missing[1]
    assert "there is no driver 'metal'" in missing[2]
    for soname in toy_gpu.SONAMES.values():
        toy_gpu.build(tmp_path / "none.c", tmp_path / soname)
    old = said("cuda", "hip")
    assert "libcuda.so.1 has no function cuGetErrorString: the driver is too old, install a newer one" in old[0]
    assert "libamdhip64.so has no function hipGetErrorString" in old[1]


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_parameters_of_real_kernels(tmp_path, monkeypatch, arch):
    """The mock reads what Triton's compilers write, so that tests of real artifacts may rely on it."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    import base64

    from inferloom.targets.triton.worker import compile_job

    driver = "cuda" if arch == "sm_90" else "hip"
    (tmp_path / "kernels.py").write_text(
        "import triton\nimport triton.language as tl\n\n@triton.jit\ndef add(out, a, dims):\n"
        "    i = tl.program_id(0) * 128 + tl.arange(0, 128)\n    m = i < tl.load(dims)\n"
        "    tl.store(out + i, tl.load(a + i, mask=m) + 1, mask=m)\n")
    job = {"path": str(tmp_path / "kernels.py"), "symbol": "add", "options": {"num_warps": 4}, "wide": [],
           "parameters": [["out", "*fp32"], ["a", "*fp32"], ["dims", "*i32"]],
           "chip": {"driver": driver, "arch": arch, "warp": 32 if driver == "cuda" else 64}}
    image = base64.b64decode(compile_job(job)["data"])
    mock = toy_gpu.mock(driver)
    gpu = Launcher(toy_gpu.launcher(), "launcher", driver, 0)
    assert gpu.function(gpu.module(image), "add", 0)
    assert mock.parameters("add") == [8] * 5
    with pytest.raises(GpuError, match="error 500"):
        gpu.function(gpu.module(image), "sub", 0)


def test_the_mock_notices_wrong_calls(artifact, mock: Mock):
    """What other tests rely on: launches, copies and parameters that a driver would refuse are refused."""
    with GpuDevice(artifact, num_blocks=1) as device:
        launches, dims = device._launches, [1, 1, 1, 0, 1]
        for name, wrong in (("threads", 2000), ("shared", 1 << 20)):
            kept = getattr(launches[0], name)
            setattr(launches[0], name, wrong)
            with pytest.raises(GpuError, match="error 1, invalid argument"):
                device._launcher.step(launches, dims)
            setattr(launches[0], name, kept)
        launches[0].mult = toy_gpu.NO_LIMIT
        with pytest.raises(GpuError, match="a launch of .* blocks is too large"):
            device._launcher.step(launches, [64, 1, 1, 0, 1])
        with pytest.raises(GpuError, match="error 1, invalid argument"):
            device._launcher.zero(device._regions["state"], 65)
