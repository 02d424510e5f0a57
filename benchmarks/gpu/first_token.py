"""A fresh process that starts a model of build.py and makes one token; prints the seconds of each part.

Run as a script, without torch. Hashing of the weights is left out (it is not of the GPU, and needs BLAKE3).
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

BEGAN = time.perf_counter()


def weights_file(size: int) -> str:
    """A file of random bytes that reads as small bf16 numbers, in the page cache."""
    piece = bytearray(os.urandom(64 << 20))
    piece[1::2] = bytes(b & 0x80 | 0x3C for b in piece[1::2])
    with tempfile.NamedTemporaryFile("wb", delete=False) as file:
        for at in range(0, size, len(piece)):
            file.write(piece[:size - at])
    return file.name


def main(folder: Path) -> dict[str, float]:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from checkout import bootstrap

    bootstrap()
    sys.path.pop(0)
    import numpy as np

    from inferloom.runtime.device.base import StepBatch, fill_inputs, input_views
    from inferloom.runtime.device.launcher import Launch, Launcher
    from inferloom.runtime.manifest import KERNELS_FILE, MANIFEST, inputs_layout, loads

    seconds, last = {}, BEGAN

    def lap(name: str) -> None:
        nonlocal last
        seconds[name], last = time.perf_counter() - last, time.perf_counter()

    lap("import")
    m = loads((folder / MANIFEST).read_bytes())
    path = weights_file(m.memory.weights)
    lap("make_file")
    gpu = Launcher((folder.parents[1] / KERNELS_FILE).read_bytes(), "kernels.so", "cuda", 0)
    lap("open")
    functions = [gpu.function(gpu.module((folder / k.launch.file).read_bytes()), k.symbol, k.launch.shared)
                 for k in m.kernels if k.launch is not None]
    lap("kernels")
    sizes = {"weights": m.memory.weights, "workspace": m.memory.workspace, "input": m.memory.inputs,
             "state": 64 * m.state.bytes_per_block}
    regions = {name: gpu.alloc(size) for name, size in sizes.items()}
    buffers = [gpu.pinned(64 << 20) for _ in range(2)]
    lap("memory")
    with open(path, "rb", buffering=0) as file:
        at = turn = 0
        while count := file.readinto(memoryview(buffers[turn % 2])):
            gpu.sync()  # the other buffer's upload, which ran while this one was read
            gpu.upload(regions["weights"] + at, buffers[turn % 2].ctypes.data, count)
            at, turn = at + count, turn + 1
    os.unlink(path)
    lap("weights")
    layout, mirror = inputs_layout(m.dims, m.tiles, m.state)[0], gpu.pinned(m.memory.inputs)
    launches = (Launch * len(m.plan))()
    for slot, call in zip(launches, m.plan):
        kernel = m.kernels[call.kernel]
        if kernel.launch is None:
            raise TypeError(kernel)
        slot.function, slot.nargs = functions[call.kernel], len(call.args)
        slot.dim, slot.tile, slot.mult = kernel.grid.dim, kernel.grid.tile, kernel.grid.mult
        slot.threads, slot.shared = kernel.launch.threads, kernel.launch.shared
        slot.least, slot.most = kernel.launch.least, kernel.launch.most
        for i, arg in enumerate(call.args):
            slot.args[i] = regions[arg.space] + (layout[arg.name][0] if arg.name else arg.offset or 0)
    ids = np.arange(16, dtype=np.int32)
    batch = StepBatch(ids, ids, ids[None], np.array([0, 16], np.int32), np.array([16], np.int32), np.array([[[0]]], np.int32),
                      np.array([15], np.int32))
    dims = fill_inputs(batch, m, input_views(m, mirror))
    gpu.upload(regions["input"], mirror.ctypes.data, mirror.size)
    gpu.step(launches, dims)
    gpu.sync()
    lap("first_token")
    return seconds


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
