"""A complete artifact of toy kernels for a GPU that does not exist, and the driver that pretends it does.

The kernels' images hold nothing but their parameters; what they do is written below in NumPy, and runs when the
mocked driver comes to them.
"""

import ctypes
import platform
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from inferloom.runtime import safetensors
from inferloom.runtime.artifact import Artifact, seal
from inferloom.runtime.manifest import Manifest, inputs_layout

ROOT = Path(__file__).parents[2]
VOCAB, LD, TOKENS, SEQS, ROWS, WIDTH = 5, 16, 64, 12, 6, 2
SONAMES = {"cuda": "libcuda.so.1", "hip": "libamdhip64.so"}
ARCHS = {"cuda": "sm_90", "hip": "gfx942"}
NO_LIMIT = 2**31 - 1
LAUNCHED = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_int32,
                            ctypes.POINTER(ctypes.c_uint64))


def build(source: Path, output: Path, *flags: str) -> Path:
    """Compile a C file to a shared library; any warning is an error. Skips the test without a C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None and find_spec("ziglang") is None:
        pytest.skip("needs a C compiler")
    command = [compiler] if compiler else [sys.executable, "-m", "ziglang", "cc"]
    subprocess.run([*command, "-O2", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", output,
                    source, *flags, "-ldl"], check=True)
    return output


@cache
def launcher() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return build(ROOT / "targets/triton/launcher.c", Path(folder) / "launcher.so").read_bytes()


@dataclass
class Launched:
    name: str
    grid: int
    block: int
    shared: int
    params: list[int]


@dataclass
class Mock:
    """The mocked driver, loaded into this process in the place of the real one."""

    lib: ctypes.CDLL
    driver: str
    log: list[Launched] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)
    callback: object = None

    def name(self, cuda: str, hip: str) -> str:
        return cuda if self.driver == "cuda" else hip

    def fail(self, call: str, code: int) -> None:
        assert self.lib.mock_fail(call.encode(), code) == 0, call

    def calls(self, call: str) -> int:
        assert (count := self.lib.mock_calls(call.encode())) >= 0, call
        return count

    def set(self, name: str, value: int) -> None:
        assert self.lib.mock_set(name.encode(), ctypes.c_uint64(value)) == 0, name

    def parameters(self, kernel: str) -> list[int]:
        sizes = (ctypes.c_int32 * 64)()
        return sizes[: self.lib.mock_parameters(kernel.encode(), sizes, 64)]

    @property
    def live(self) -> int:
        return self.lib.mock_live()

    def run(self, kernels: dict[str, Callable[..., None]]) -> None:
        """Log every launch, and run these in the place of the kernels of their names."""
        def launched(name: bytes, grid: int, block: int, shared: int, count: int, params: Sequence[int]) -> None:
            try:
                self.log.append(Launched(name.decode(), grid, block, shared, params[:count]))
                if name.decode() in kernels:
                    kernels[name.decode()](grid, *params[: count - 2])
            except Exception as error:  # ctypes would only print it
                self.errors.append(error)

        self.callback = LAUNCHED(launched)
        self.lib.mock_on_launch(self.callback)

    def reset(self) -> None:
        self.lib.mock_reset()
        self.log.clear()
        self.errors.clear()


@cache
def _load(driver: str) -> Mock:
    if any(SONAMES[driver] in line for line in Path("/proc/self/maps").read_text().splitlines()):
        pytest.skip(f"this process has a real {SONAMES[driver]}")
    # A later dlopen by this soname finds the library that is loaded already.
    with tempfile.TemporaryDirectory() as folder:
        path = build(Path(__file__).with_name("mock_driver.c"), Path(folder) / SONAMES[driver],
                     f"-Wl,-soname,{SONAMES[driver]}")
        lib = ctypes.CDLL(str(path))
    for name in ("calls", "launched", "pageable", "live"):
        getattr(lib, f"mock_{name}").restype = ctypes.c_int64
    return Mock(lib, driver)


def mock(driver: str) -> Mock:
    """The mocked driver as in the beginning, running the toy kernels."""
    made = _load(driver)
    made.reset()
    made.run(KERNELS)
    return made


def _i32(address: int, *shape: int) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_int32 * int(np.prod(shape))).from_address(address)).reshape(shape)


def _f32(address: int, *shape: int) -> np.ndarray:
    return _i32(address, *shape).view(np.float32)


def _store(grid: int, state: int, tokens: int, slots: int, dims: int) -> None:
    """The state keeps each token's id in its slot. A block does 4 tokens."""
    for i in range(min(grid * 4, _i32(dims, 8)[0])):
        _i32(state + 4 * int(_i32(slots, TOKENS)[i]), 1)[0] = _i32(tokens, TOKENS)[i]


def _tiles(kind: int) -> Callable[..., None]:
    def count(grid: int, mark: int, tiles: int, dims: int) -> None:
        """mark = tokens in the tiles of this kind."""
        _f32(mark, 1)[0] = sum(int(_i32(tiles + 12 * i, 3)[2]) for i in range(min(grid, _i32(dims, 8)[kind])))
    return count


def _clear(grid: int, mark: int) -> None:
    """The marks of both kinds, which are next to each other."""
    _f32(mark, 2)[:] = 0


def _logits(grid: int, out: int, weights: int, tokens: int, rows: int, tables: int, state: int, starts: int, lens: int,
            marks: int, dims: int) -> None:
    """out[r][v] = w[v] * token + the sum of the sequence's state + 1000 * tokens of q_tiles + 100,000 * of d_tiles."""
    counts = _i32(dims, 8)
    for r in range(min(grid, counts[2])):
        token = int(_i32(rows, ROWS)[r])
        seq = int(np.searchsorted(_i32(starts, SEQS + 1)[: counts[1] + 1], token, "right")) - 1
        sum_ = np.float32(1000 * _f32(marks, 2)[0] + 100_000 * _f32(marks, 2)[1])
        for at in range(int(_i32(lens, SEQS)[seq])):
            sum_ += _i32(state + 4 * (16 * int(_i32(tables, SEQS, WIDTH)[seq, at // 16]) + at % 16), 1)[0]
        _f32(out + 4 * LD * r, VOCAB)[:] = _f32(weights, VOCAB) * _i32(tokens, TOKENS)[token] + sum_


def _top(grid: int, keys: int, stats: int, logits: int, sharpness: int, dims: int) -> None:
    """The three largest logits of each row."""
    for r in range(min(grid, _i32(dims, 8)[2])):
        row, sharp = _f32(logits + 4 * LD * r, VOCAB), _f32(sharpness, ROWS)[r]
        bits = row.view(np.int32).astype(np.int64)
        packed = np.where(bits < 0, bits ^ 0x7FFFFFFF, bits) << 32 | 0x7FFFFFFF - np.arange(VOCAB)
        _i32(keys + 24 * r, 6)[:] = np.sort(packed)[::-1][:3].copy().view(np.int32)
        _f32(stats + 8 * r, 2)[:] = row.max() * sharp, np.exp((row - row.max()) * sharp).sum()


KERNELS = {"store": _store, "prefill": _tiles(3), "decode": _tiles(4), "clear": _clear, "few": _logits, "many": _logits,
           "top": _top}


def elf(machine: int, sections: dict[str, tuple[int, bytes]]) -> bytes:
    """A little-endian ELF file of these sections: {name: (type, content)}."""
    sections = {"": (0, b""), **sections, ".shstrtab": (3, b"")}
    names, offsets = b"", {}
    for name in sections:
        offsets[name] = len(names)
        names += name.encode() + b"\0"
    sections[".shstrtab"] = (3, names)
    body, headers = b"", b""
    for name, (kind, content) in sections.items():
        headers += struct.pack("<IIQQQQIIQQ", offsets[name], kind, 0, 0, 64 + len(body), len(content), 0, 0, 1, 0)
        body += content + bytes(-len(content) % 8)
    return struct.pack("<4sBBBB8xHHIQQQIHHHHHH", b"\x7fELF", 2, 1, 1, 0, 2, machine, 1, 0, 0, 64 + len(body), 0, 64, 56,
                       0, 64, len(sections), len(sections) - 1) + body + headers


def cubin(kernel: str, sizes: Sequence[int]) -> bytes:
    """What a cubin says of a kernel's parameters, and some attributes besides."""
    info = struct.pack("<BBH", 3, 0x1B, 255) + struct.pack("<BBH8x", 4, 0x0A, 8)
    for i in reversed(range(len(sizes))):
        info += struct.pack("<BBHIHHI", 4, 0x17, 12, 0, i, 8 * i, sizes[i] << 18 | 0x1F000)
    return elf(190, {".text." + kernel: (1, b"code"), ".nv.info." + kernel: (0x70000000, info)})


def hsaco(kernel: str, sizes: Sequence[int]) -> bytes:
    """What a code object says of a kernel's parameters, and the compiler's hidden ones."""
    args: list[object] = [{".address_space": "global", ".offset": 8 * i, ".size": size, ".value_kind": "global_buffer"}
                          for i, size in enumerate(sizes)]
    args.append({".offset": 256, ".size": 4, ".value_kind": "hidden_block_count_x"})
    data = _msgpack({"amdhsa.kernels": [{".agpr_count": 0, ".args": args, ".kernarg_segment_size": 70000,
                                         ".name": kernel, ".symbol": kernel + ".kd"}],
                     "amdhsa.target": "amdgcn-amd-amdhsa--gfx942", "amdhsa.version": [1, 2]})
    note = struct.pack("<III8s", 7, len(data), 32, b"AMDGPU") + data + bytes(-len(data) % 4)
    return elf(224, {".note": (7, note), ".text": (1, b"code")})


def _msgpack(value: object) -> bytes:
    if isinstance(value, int):
        return bytes([value]) if value < 128 else struct.pack(">BI", 0xCE, value)
    if isinstance(value, str):
        return (bytes([0xA0 | len(value)]) if len(value) < 32 else bytes([0xD9, len(value)])) + value.encode()
    if isinstance(value, list):
        return struct.pack(">BH", 0xDC, len(value)) + b"".join(map(_msgpack, value))
    assert isinstance(value, dict)
    return bytes([0x80 | len(value)]) + b"".join(_msgpack(k) + _msgpack(v) for k, v in value.items())


def toy_manifest(driver: str, top: bool = False) -> dict:
    """The toy's manifest as JSON, its files table empty; perhaps with a last kernel that finds the largest logits."""
    suffix = "cubin" if driver == "cuda" else "hsaco"

    def arg(space: str, offset: int) -> dict:
        return {"space": space, "offset": offset}

    def named(name: str) -> dict:
        return {"space": "input", "name": name}

    def kernel(symbol: str, dim: int, tile: int = 1, mult: int = 1, threads: int = 128, shared: int = 0,
               least: int = 0, most: int = NO_LIMIT) -> dict:
        return {"symbol": symbol, "kind": "row", "source": [], "grid": {"dim": dim, "tile": tile, "mult": mult},
                "launch": {"file": f"kernels/{symbol}.{suffix}", "threads": threads, "shared": shared, "least": least,
                           "most": most}, "resources": {"registers": 32}}

    logits = [arg("workspace", 0), arg("weights", 0), named("tokens"), named("logit_rows"), named("block_tables"),
              arg("state", 0), named("seq_starts"), named("kv_lens"), arg("workspace", ROWS * LD * 4), named("dims")]
    shared = 100_000 if driver == "cuda" else 60_000
    manifest: dict = {
        "schema": 3, "abi": 2, "versions": {"inferloom": "0.1.0"},
        "model": {"name": "toy", "architecture": "Toy", "vocab_size": VOCAB, "max_model_len": 32,
                  "eos_token_ids": [1], "bos_token_id": None, "dtype": "fp32"},
        "chip": {"name": "toy-gpu", "triple": f"{platform.machine()}-linux-gnu", "features": [], "driver": driver,
                 "arch": ARCHS[driver]},
        "dims": {"tokens": TOKENS, "seqs": SEQS, "rows": ROWS, "blocks_per_seq": WIDTH},
        "tiles": {"prefill": 16, "decode": 2},
        "state": {"block_tokens": 16, "bytes_per_block": 64, "groups": [
            {"kind": "paged_kv", "window": 0, "tables": 1, "layers": [
                {"table": 0, "offset": 0, "bytes": 64, "dtype": "f32", "shape": [1, 1, 0]}]}]},
        "memory": {"weights": 64, "workspace": ROWS * LD * 4 + 64, "inputs": 0, "bytes_per_block": 64},
        "output": {"name": "logits", "offset": 0, "ld": LD, "vocab": VOCAB, "top": None},
        "kernels": [kernel("store", 0, tile=4), kernel("clear", -1, mult=3), kernel("prefill", 3), kernel("decode", 4),
                    kernel("few", 2, most=2, threads=32, shared=512),
                    kernel("many", 2, mult=2, least=3, threads=256, shared=shared)],
        "plan": [
            {"kernel": 0, "args": [arg("state", 0), named("tokens"), named("slots"), named("dims")]},
            {"kernel": 1, "args": [arg("workspace", ROWS * LD * 4)]},
            {"kernel": 2, "args": [arg("workspace", ROWS * LD * 4), named("q_tiles"), named("dims")]},
            {"kernel": 3, "args": [arg("workspace", ROWS * LD * 4 + 4), named("d_tiles"), named("dims")]},
            {"kernel": 4, "args": logits}, {"kernel": 5, "args": logits}],
        "weights": {"file": "weights/model.safetensors", "data_offset": 128, "bytes": 64},
        "numerics": {}, "files": {},
    }
    if top:
        end = ROWS * LD * 4 + 64
        manifest["output"]["top"] = {"count": 3, "keys": end, "stats": end + 192}
        manifest["memory"]["workspace"] = end + 256
        manifest["kernels"].append(kernel("top", 2))
        manifest["plan"].append({"kernel": 6, "args": [arg("workspace", end), arg("workspace", end + 192), arg("workspace", 0),
                                                       named("sharpness"), named("dims")]})
    filled = Manifest.from_json(manifest | {"memory": manifest["memory"] | {"inputs": 1 << 20}})
    manifest["memory"]["inputs"] = inputs_layout(filled.dims, filled.tiles, filled.state)[1]
    return manifest


def write_toy(folder: Path, driver: str, library: bytes | None = None, changes: dict | None = None) -> Artifact:
    """Seal a toy artifact in `folder`; `changes` replace top-level keys of the manifest."""
    for name in ("kernels", "weights", "tokenizer"):
        (folder / name).mkdir(parents=True)
    manifest = Manifest.from_json(toy_manifest(driver) | (changes or {}))
    (folder / "kernels" / "kernels.so").write_bytes(library if library is not None else launcher())
    for call in manifest.plan:
        kernel = manifest.kernels[call.kernel]
        if kernel.launch is not None:
            image = cubin if driver == "cuda" else hsaco
            (folder / kernel.launch.file).write_bytes(image(kernel.symbol, [8] * (len(call.args) + 2)))
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    weights = np.zeros(16, np.float32)
    weights[:VOCAB] = np.arange(VOCAB)
    header = safetensors.write(folder / "weights" / "model.safetensors", [("scale", "F32", (16,))], [weights.tobytes()])
    assert header.data_offset == 128
    return seal(folder, manifest)
