"""What the GPU launcher costs the CPU for each launch of a step, with a driver that does nothing but count.

    python -m inferloom.benchmarks.launch_overhead [launches]

Needs a checkout, for the mocked driver is one of the tests', and a C compiler.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from inferloom.benchmarks.machine import _c_compiler
from inferloom.errors import InferloomError
from inferloom.runtime.device.launcher import Launch, Launcher

ROOT = Path(__file__).parents[1]
ARGS = 10
#: Calls the driver's launch function and does nothing else.
BARE = """
#include <stdint.h>
typedef int (*fn)(void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void *, void **, void **);
int bare(fn launch, void *function, void *stream, int n) {
  int bad = 0;
  for (int i = 0; i < n; i++) bad |= launch(function, 1, 1, 1, 128, 1, 1, 0, stream, 0, 0);
  return bad;
}
"""


def measure(count: int, repeats: int = 200) -> dict[str, float]:
    """Nanoseconds a launch, best of `repeats` steps of `count` launches of 10 arguments.

    `step`: in il_gpu_step; `driver`: of it, the driver's function alone; `skipped`: a launch that its dims rule out.
    """
    mock = ROOT / "tests/runtime/mock_driver.c"
    if not mock.is_file():
        raise InferloomError(f"{mock} is missing: run this from a checkout")
    with tempfile.TemporaryDirectory() as folder:
        # A later dlopen by this soname finds the library that is loaded already.
        driver = ctypes.CDLL(str(_build(mock, folder, "libcuda.so.1", "-Wl,-soname,libcuda.so.1")))
        source = Path(folder) / "bare.c"
        source.write_text(BARE)
        bare = ctypes.CDLL(str(_build(source, folder, "bare.so"))).bare
        library = _build(ROOT / "targets/triton/launcher.c", folder, "launcher.so").read_bytes()
    gpu = Launcher(library, "launcher", "cuda", 0)
    # To the mock, zeros are a kernel without parameters and an idle stream.
    function, stream = ctypes.create_string_buffer(4096), ctypes.create_string_buffer(4096)
    launches = (Launch * count)()
    for launch in launches:
        launch.function, launch.nargs, launch.threads = ctypes.addressof(function), ARGS, 128
        launch.tile, launch.mult, launch.least, launch.most = 16, 1, 1, 64
    address = ctypes.cast(driver.cuLaunchKernel, ctypes.c_void_p)
    result = {"step": _best(lambda: gpu.step(launches, [64] * 5), count, repeats),
              "driver": _best(lambda: bare(address, function, stream, count), count, repeats),
              "skipped": _best(lambda: gpu.step(launches, [65] * 5), count, repeats)}
    return result


def _build(source: Path, folder: str, name: str, *flags: str) -> Path:
    output = Path(folder) / name
    subprocess.run([*_c_compiler(), "-O2", "-std=gnu11", "-shared", "-fPIC", "-o", str(output), str(source), *flags,
                    "-ldl"], check=True)
    return output


def _best(work: Callable[[], object], count: int, repeats: int) -> float:
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter_ns()
        work()
        best = min(best, time.perf_counter_ns() - start)
    return best / count


if __name__ == "__main__":
    launches = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    ns = measure(launches)
    print(f"il_gpu_step, {launches} launches of {ARGS} arguments: {ns['step']:.1f} ns a launch, of which the mocked driver "
          f"{ns['driver']:.1f}; skipped {ns['skipped']:.1f}")
