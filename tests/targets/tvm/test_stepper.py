"""The stepper: every chunk of every stage once, stages in order, whatever the number of threads."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from inferloom.targets.chips import find
from inferloom.targets.link import link_shared
from inferloom.targets.tvm.codegen import STEPPER
from tests.targets.tvm.harness import Call, load

#: a0: how often each chunk ran; a1: the same of the stage before (or null), a2: how many chunks that has; a3: who ran what
KERNEL = """
#include <pthread.h>
#include <stdint.h>
void count(int32_t *runs, const int32_t *before, const int32_t *size, int64_t *who, void *a4, void *a5, void *a6, void *a7,
           void *a8, void *a9, void *a10, void *a11, void *a12, void *a13, void *a14, void *a15, const int32_t *dims,
           int32_t chunk) {
  int ready = 1;
  if (before)
    for (int32_t i = 0; i < *size; i++) ready &= __atomic_load_n(&before[i], __ATOMIC_RELAXED) == 1;
  __atomic_fetch_add(&runs[chunk], ready ? 1 : 1000, __ATOMIC_RELAXED);
  who[chunk] = (int64_t)pthread_self();
  for (volatile int i = 0; i < 2000; i++) {}
}
"""
SIZES = (1000, 1, 0, 7, 64, 2, 333)


@pytest.fixture(scope="module")
def lib(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    source = tmp_path_factory.mktemp("stepper") / "count.c"
    source.write_text(KERNEL)
    return load(link_shared([], [STEPPER, source], find("cpu").triple))


@pytest.mark.parametrize("threads", [1, 2, 3, 8, 64])
def test_every_chunk_once_and_in_order(lib: ctypes.CDLL, threads: int) -> None:
    assert lib.il_threads(threads) == threads
    dims = (ctypes.c_int32 * 5)(333, 7, 0, 0, 0)
    for stages in (len(SIZES), 3, len(SIZES)):
        for _ in range(20):
            runs = [np.zeros(max(n, 1), np.int32) for n in SIZES]
            who = [np.zeros(max(n, 1), np.int64) for n in SIZES]
            sizes = np.array(SIZES, np.int32)
            calls = (Call * stages)()
            for i, call in enumerate(calls):
                call.fn = ctypes.cast(lib.count, ctypes.c_void_p)
                call.args[0], call.args[3] = runs[i].ctypes.data, who[i].ctypes.data
                if i and SIZES[i - 1]:
                    call.args[1], call.args[2] = runs[i - 1].ctypes.data, sizes[i - 1:].ctypes.data
                # 7 and 333 by the dims of the step: sequences one by one, tokens in tiles of 1
                call.dim, call.tile, call.mult = {7: (1, 1, 1), 333: (0, 1, 1)}.get(SIZES[i], (-1, 1, SIZES[i]))
            assert lib.il_step(calls, stages, dims, None) == 0
            for n, ran in zip(SIZES[:stages], runs):
                assert (ran[:n] == 1).all()
    if threads == 2:  # each has a run of the chunks, but for what one does for the other at the end
        changes = np.count_nonzero(np.diff(who[0]))
        assert changes < 500
    lib.il_threads(1)


@pytest.mark.parametrize("options, most, steps", [(["-O2"], 64, 300), (["-O1", "-fsanitize=thread"], 8, 300)],
                         ids=["plain", "thread-sanitizer"])
def test_stress(tmp_path: Path, options: list[str], most: int, steps: int) -> None:
    """Steps of few small chunks, in which threads fall asleep: late ones take nothing of a step that is not theirs."""
    compiler, program = shutil.which("cc") or shutil.which("gcc"), tmp_path / "stress"
    if compiler is None:
        pytest.skip("needs a C compiler")
    sources = [STEPPER, Path(__file__).with_name("stepper_stress.c")]
    built = subprocess.run([compiler, *options, "-w", "-pthread", *sources, "-o", program], capture_output=True, text=True)
    if built.returncode and "tsan" in built.stderr:
        pytest.skip("the compiler has no thread sanitizer here")
    assert built.returncode == 0, built.stderr
    ran = subprocess.run([program, str(most), str(steps)], capture_output=True, text=True, timeout=300)
    assert (ran.returncode, ran.stdout) == (0, "done\n"), ran.stderr


def test_pinned_threads_stay_on_a_core_each(lib: ctypes.CDLL) -> None:
    usable, before = os.sched_getaffinity(0), set(os.listdir("/proc/self/task"))
    lib.il_pin(1)
    try:
        assert lib.il_threads(4) == 4
        places = [os.sched_getaffinity(int(t)) for t in sorted(set(os.listdir("/proc/self/task")) - before, key=int)]
    finally:
        lib.il_pin(0)
        lib.il_threads(1)
    cores = sorted(usable)
    assert places == [{cores[n % len(cores)]} for n in (1, 2, 3)] and os.sched_getaffinity(0) == usable
