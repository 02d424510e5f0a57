"""Where compiled checkpoints are kept: one folder per (checkpoint content, options, compiler), under XDG cache.

The key is content: BLAKE3 over the checkpoint's files, the options, the compiler's own source and versions.
A file's digest is remembered by its size, time stamp and inode, so that a large checkpoint is read once.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from blake3 import blake3

from inferloom.errors import MissingExtraError, UsageError
from inferloom.runtime.manifest import Embedding

Progress = Callable[[str], None]

COMPILE_PACKAGES = ("torch", "transformers", "safetensors", "ml_dtypes", "triton", "apache-tvm", "apache-tvm-ffi",
                    "ziglang")
_IMPORT_NAMES = {"apache-tvm": "tvm", "apache-tvm-ffi": "tvm_ffi"}
_SKIPPED = (".bin", ".pt", ".pth", ".gguf", ".onnx", ".msgpack", ".h5", ".py", ".md")


@dataclass(frozen=True, slots=True)
class CompileOptions:
    """What, besides the checkpoint, decides an artifact's bytes."""

    chip: str = "cpu"
    dtype: str = "bf16"
    max_model_len: int | None = None
    max_tokens: int = 2048
    max_seqs: int = 64
    block_tokens: int = 32
    batch_invariant: bool = False
    passes: tuple[str, ...] = ()
    quant: str | None = None
    quant_head: str | None = None
    quant_embedding: str | None = None
    quant_activations: str | None = None
    kv_dtype: str | None = None
    task: str = "generate"
    pooling: str | None = None
    normalize: bool | None = None


def is_artifact(path: Path) -> bool:
    """Whether `path` holds an artifact (its manifest; the loader checks the rest)."""
    return (path / "manifest.json").is_file()


def is_checkpoint(path: Path) -> bool:
    """Whether `path` looks like a Hugging Face checkpoint with safetensors weights, or is a GGUF file or an ONNX model."""
    return (path / "config.json").is_file() and any(path.glob("*.safetensors")) or _is_gguf(path) or _is_onnx(path)


def _is_gguf(path: Path) -> bool:
    from inferloom.compiler.frontends.paths import is_gguf

    return is_gguf(path)


def _is_onnx(path: Path) -> bool:
    from inferloom.compiler.frontends.paths import is_onnx

    return is_onnx(path)


def cache_dir() -> Path:
    """`$XDG_CACHE_HOME/inferloom`, or `~/.cache/inferloom`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "inferloom"


def missing_compile_packages() -> list[str]:
    """Distributions of the `compile` extra that are not importable (imports none of them)."""
    return [name for name in COMPILE_PACKAGES if find_spec(_IMPORT_NAMES.get(name, name)) is None]


def require_compiler(why: str) -> None:
    """Raise `MissingExtraError` with the command to run, unless the `compile` extra is installed."""
    missing = missing_compile_packages()
    if missing:
        raise MissingExtraError(
            f"{why} needs the compiler, and {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not "
            "installed; run: pip install 'inferloom[compile]' (or compile on another machine and copy the artifact)")


def require_front_end(model: Path) -> None:
    """Raise `MissingExtraError` with the command to run when what reads `model` is not installed."""
    if _is_onnx(model) and find_spec("onnx") is None:
        raise MissingExtraError(f"reading {model} needs the package onnx; run: pip install 'inferloom[compile,onnx]'")


def resolve(model: str | os.PathLike[str], options: CompileOptions | None = None,
            progress: Progress | None = None) -> Path:
    """The artifact to load for `model`: itself, or a checkpoint's artifact from the cache, compiled on first use.

    Raises `UsageError` for a path that is neither, and for an artifact that is not quantised as `options` say, where they
    do; `MissingExtraError` where compiling is needed and impossible.
    """
    path = Path(model).expanduser()
    if is_artifact(path):
        _check_compiled(path, options or CompileOptions())
        return path
    if not path.exists():
        raise UsageError(f"{path} does not exist; give an artifact (a folder with manifest.json), a checkpoint "
                         "(a folder with config.json and *.safetensors), a GGUF file or an ONNX file")
    if not is_checkpoint(path):
        raise UsageError(f"{path} is neither an artifact (no manifest.json) nor a checkpoint "
                         "(no config.json with *.safetensors) nor a GGUF file nor an ONNX model (no *.onnx)")
    return compile_cached(path, options or CompileOptions(), progress)


def _check_compiled(artifact: Path, options: CompileOptions) -> None:
    """`UsageError` when a ready artifact was compiled with other options of quantisation, or for another task, than are given."""
    wanted = {name: value for name in ("quant", "quant_head", "quant_embedding", "quant_activations", "kv_dtype")
              if (value := getattr(options, name)) is not None}
    wanted |= {"task": options.task} if options.task != "generate" else {}
    wanted |= {name: value for name in ("pooling", "normalize") if (value := getattr(options, name)) is not None}
    if not wanted:
        return
    manifest = json.loads((artifact / "manifest.json").read_text())
    had = {"kv_dtype": manifest["model"]["dtype"], "task": manifest.get("task", "generate"),
           **(asdict(Embedding()) | manifest.get("embedding", {}) if manifest.get("task") == "embed" else {}),
           **manifest.get("numerics", {}).get("options", {})}
    for name, value in wanted.items():
        if value != had.get(name, "none"):
            option = "--" + name.replace("_", "-")
            raise UsageError(f"{artifact} is compiled already, with {option} {had.get(name, 'none')}, not {value}: leave "
                             f"{option} out, or give the checkpoint that it was compiled from")


def compile_cached(checkpoint: Path, options: CompileOptions, progress: Progress | None = None) -> Path:
    """The artifact of `checkpoint` in the cache; compiled if it is not there. One process compiles, others wait."""
    report = progress or (lambda _: None)
    require_compiler(f"compiling {checkpoint}")
    require_front_end(checkpoint)
    key = content_key(checkpoint, options)
    out = cache_dir() / "artifacts" / f"{checkpoint.resolve().name}-{options.quant or options.dtype}-{key[:16]}"
    with _lock(out.with_suffix(".lock"), report):
        if not is_artifact(out):
            report(f"compiling {checkpoint} once, into {out}")
            from inferloom.compiler.build import compile_model

            compile_model(checkpoint, out, **asdict(options), progress=progress)
    return out


def content_key(checkpoint: Path, options: CompileOptions) -> str:
    """Hex digest of all that decides the artifact's bytes."""
    digest = blake3(json.dumps(asdict(options), sort_keys=True).encode())
    if options.passes:
        from inferloom.compiler.plugins import source_of, split

        for name in options.passes:
            digest.update(b"\0" + source_of(split(name)[0]).read_bytes())
    for name, value in sorted(_files(checkpoint).items()):
        digest.update(f"\0{name}\0{value}".encode())
    for package in (*COMPILE_PACKAGES, *(["onnx"] if _is_onnx(checkpoint) else [])):
        digest.update(f"\0{package}={_version(package)}".encode())
    digest.update(_compiler_source())
    if options.chip == "cpu":
        digest.update(_cpu_flags())
    return digest.hexdigest()


def _files(checkpoint: Path) -> Mapping[str, str]:
    """Digest of each file that compiling may read, by name; digests are remembered in the cache folder."""
    memo_path = cache_dir() / "digests.json"
    try:
        memo: dict[str, str] = json.loads(memo_path.read_text())
    except (OSError, ValueError):
        memo = {}
    digests, before = {}, len(memo)
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    for path in _inputs(checkpoint):
        stat = path.stat()
        stamp = f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ino}"
        if stamp not in memo:
            memo[stamp] = blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()
        digests[os.path.relpath(path, folder)] = memo[stamp]
    if len(memo) != before:
        memo_path.parent.mkdir(parents=True, exist_ok=True)
        temporary = memo_path.with_name(f"digests.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(memo, indent=1, sort_keys=True))
        temporary.replace(memo_path)
    return digests


def _inputs(checkpoint: Path) -> list[Path]:
    """The files that compiling may read."""
    if _is_gguf(checkpoint):
        from inferloom.compiler.frontends.paths import TOKENIZER_FILES, gguf_file

        file = gguf_file(checkpoint)
        return [file, *(p for name in TOKENIZER_FILES if (p := file.parent / name).is_file())]
    if not _is_onnx(checkpoint):
        pooling = sorted(checkpoint.glob("*/config.json")) if (checkpoint / "modules.json").is_file() else []
        return [*(p for p in sorted(checkpoint.iterdir()) if p.is_file() and p.suffix not in _SKIPPED), *pooling]
    from inferloom.compiler.frontends.onnx.file import files_of
    from inferloom.compiler.frontends.paths import onnx_facts, onnx_file

    file = onnx_file(checkpoint)
    return [*files_of(file), *onnx_facts(file).values()]


def _compiler_source() -> bytes:
    """Digest of the source of everything that takes part in compiling."""
    digest = blake3()
    for part in ("ir", "compiler", "targets"):
        spec = find_spec(f"inferloom.{part}")
        for root in (spec.submodule_search_locations or ()) if spec else ():
            for path in sorted(Path(root).rglob("*")):
                if path.suffix in (".py", ".c", ".h", ".json", ".toml"):
                    digest.update(f"\0{path.name}\0".encode() + path.read_bytes())
    return digest.digest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _cpu_flags() -> bytes:
    """What `chip="cpu"` stands for on this machine."""
    try:
        with open("/proc/cpuinfo", "rb") as file:
            return b"".join(sorted({line for line in file if line.startswith((b"flags", b"Features", b"model name"))}))
    except OSError:
        return b""


@contextmanager
def _lock(path: Path, report: Progress) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("another process is compiling this checkpoint; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def size_on_disk(path: Path) -> int:
    """Bytes of all files under `path`; 0 where there is none."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if path.exists() else 0


def free_bytes(path: Path) -> int:
    """Free bytes of the file system that holds `path` (or its first existing parent)."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
