"""An artifact: a folder whose every byte is vouched for.

    SEAL -> manifest.json -> the table of files -> each file

`SEAL` holds the BLAKE3 of the manifest and the manifest that of every other file. A file's bytes are hashed in
the memory they are used from, so nothing unverified is ever parsed, mapped or executed.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

from blake3 import blake3

from inferloom.runtime import manifest as manifests
from inferloom.runtime.errors import ArtifactError
from inferloom.runtime.manifest import FOREIGN, MANIFEST, SEAL, FileInfo, Manifest, kernels_files
from inferloom.runtime.publish import publish, staging
from inferloom.runtime.safetensors import read_header
from inferloom.runtime.weights import Weights, load_verified, load_weights

__all__ = ["Artifact", "host_features", "publish", "seal", "staging"]
_MAX_MANIFEST = 64 << 20
_HASH_BYTES = 16 << 20
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+\-]*")
_HASH = re.compile(r"[0-9a-f]{64}")
_SVE_BYTES = Path("/proc/sys/abi/sve_default_vector_length")
_MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}


class Artifact:
    """A sealed, checked artifact; open it with `Artifact.open`."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @staticmethod
    def open(path: str | os.PathLike[str], check_chip: bool = True) -> Artifact:
        """Check the seal, schema, file table and (unless told not to) that this machine can run it.

        Contents of files are verified when they are used: see `read` and `load_weights`. Raises ArtifactError.
        """
        root = Path(path)
        if not root.is_dir():
            raise ArtifactError(f"{root} is not an artifact: no such folder; make one with `inferloom compile`")
        recorded = _small(root / SEAL, 65).decode("ascii", "replace")
        if not _HASH.fullmatch(recorded.rstrip("\n")) or not recorded.endswith("\n"):
            raise ArtifactError(f"{root / SEAL} is damaged: it must hold one BLAKE3 hash and a newline")
        data = _small(root / MANIFEST, _MAX_MANIFEST)
        if blake3(data).hexdigest() != recorded.strip():
            raise ArtifactError(f"{root / MANIFEST} does not match {SEAL}: it was changed; copy or compile it again")
        artifact = Artifact(root, manifests.loads(data))
        artifact._check_files()
        if check_chip:
            artifact.check_chip()
        return artifact

    @property
    def identity(self) -> str:
        """The BLAKE3 of the manifest, in hex: what state was computed by."""
        return blake3(manifests.dumps(self.manifest)).hexdigest()

    def read(self, name: str) -> bytes:
        """The verified bytes of a listed file. ArtifactError when it is not listed or is damaged."""
        return load_verified(self.path / name, self._info(name)).bytes.tobytes()

    def load_weights(self) -> Weights:
        """The weights in memory, verified there."""
        w = self.manifest.weights
        return load_weights(self.path / w.file, self._info(w.file), w.data_offset)

    def check_chip(self) -> None:
        """ArtifactError unless this runtime has a device for the kernels, and this machine what they need of a CPU."""
        if self.manifest.chip.driver in FOREIGN:
            raise ArtifactError(f"{self.path} was compiled for chip {self.manifest.chip.name}, which this runtime has no device "
                                "for: run its kernels/ by the manifest's plan in a program of your own (docs/targets.md), or "
                                "compile the model for this machine (--chip cpu)")
        chip, machine = self.manifest.chip, platform.machine().lower()
        arch = chip.triple.split("-")[0]
        if arch != _MACHINES.get(machine, machine):
            raise ArtifactError(f"{self.path} was compiled for chip {chip.name} ({arch}), this machine is {machine}: "
                                "compile for this machine")
        missing = sorted(set(chip.features) - host_features())
        if missing:
            raise ArtifactError(f"{self.path} was compiled for chip {chip.name}; this machine's CPU lacks "
                                f"{', '.join(missing)}: compile for this machine")

    def _info(self, name: str) -> FileInfo:
        if name not in self.manifest.files:
            raise ArtifactError(f"{self.path} has no file {name!r}")
        return self.manifest.files[name]

    def _check_files(self) -> None:
        files, w = self.manifest.files, self.manifest.weights
        for name, info in files.items():
            if not all(_PART.fullmatch(part) for part in name.split("/")) or name in (SEAL, MANIFEST):
                raise ArtifactError(f"manifest.files: {name!r} is not a plain relative path")
            if not _HASH.fullmatch(info.blake3) or info.bytes < 0:
                raise ArtifactError(f"manifest.files[{name!r}] must have a BLAKE3 in hex and a size")
        for name in (*sorted(kernels_files(self.manifest)), w.file):
            if name not in files:
                raise ArtifactError(f"manifest.files does not list {name!r}")
        if w.data_offset + w.bytes != files[w.file].bytes:
            raise ArtifactError(f"manifest.weights: data_offset {w.data_offset} + bytes {w.bytes} is not the "
                                f"{files[w.file].bytes} bytes of {w.file}")
        found = dict(_walk(self.path))
        if extra := found.keys() - files.keys():
            raise ArtifactError(f"{self.path} holds files that are not part of it: {_some(extra)}; remove them")
        if lost := files.keys() - found.keys():
            raise ArtifactError(f"{self.path} lacks {_some(lost)}; copy or compile it again")
        for name, size in found.items():
            if size != files[name].bytes:
                raise ArtifactError(f"{self.path / name} has {size} bytes, the manifest records {files[name].bytes}: "
                                    "it is damaged; copy or compile it again")


def seal(folder: str | os.PathLike[str], manifest: Manifest) -> Artifact:
    """Fill in the table of files of `folder`, write manifest and seal to disk, and open the result.

    `manifest.files` is ignored. Raises ArtifactError when the folder does not hold what the manifest says.
    """
    root, files = Path(folder), {}
    for name, size in sorted(_walk(root)):
        files[name] = FileInfo(size, _hash(root / name))
        _sync(root / name)
    data = manifests.dumps(replace(manifest, files=files))
    for name, content in ((MANIFEST, data), (SEAL, (blake3(data).hexdigest() + "\n").encode())):
        (root / name).write_bytes(content)
        _sync(root / name)
    artifact = Artifact.open(root, check_chip=False)
    w = artifact.manifest.weights
    if (offset := read_header(root / w.file).data_offset) != w.data_offset:
        raise ArtifactError(f"manifest.weights.data_offset is {w.data_offset}, but {w.file} has its data at {offset}")
    _sync(root)
    return artifact


@cache
def _hash(path: Path) -> str:
    """BLAKE3 of a file, read in pieces: a mapping of a large file would count as this process's memory."""
    hasher = blake3(max_threads=blake3.AUTO)
    with path.open("rb") as file:
        while piece := file.read(_HASH_BYTES):
            hasher.update(piece)
    return hasher.hexdigest()


def host_features() -> frozenset[str]:
    """This machine's CPU flags, as /proc/cpuinfo names them; a RISC-V `isa` string is taken apart.

    sve512 is among them where the vectors of a process have 512 bits or more.
    """
    found: set[str] = set()
    if _SVE_BYTES.exists() and int(_SVE_BYTES.read_text()) >= 64:
        found.add("sve512")
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            key, _, value = line.partition(":")
            if key.strip() in ("flags", "Features"):
                found.update(value.lower().split())
                break
            if key.strip() == "isa":
                base, *extensions = value.strip().lower().split("_")
                found.update(base.removeprefix("rv64").removeprefix("rv32"), extensions)
                break
    return frozenset(found)


def _small(path: Path, limit: int) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise ArtifactError(f"cannot open {path}: {error.strerror}; an artifact is made with `inferloom compile`"
                            ) from None
    with os.fdopen(fd, "rb") as file:
        try:
            data = file.read(limit + 1)
        except OSError as error:
            raise ArtifactError(f"cannot read {path}: {error.strerror}") from None
    if len(data) > limit:
        raise ArtifactError(f"{path} is larger than {limit} bytes: it is damaged")
    return data


def _walk(root: Path, below: str = "") -> Iterator[tuple[str, int]]:
    """(relative path, bytes) of every file but manifest and seal. ArtifactError on anything but files and folders."""
    for entry in os.scandir(root / below):
        name = below + entry.name
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(root, name + "/")
        elif not entry.is_file(follow_symlinks=False):
            raise ArtifactError(f"{root / name} is a link or a special file; an artifact holds plain files only")
        elif name not in (SEAL, MANIFEST):
            yield name, entry.stat(follow_symlinks=False).st_size


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:5]) + (f" and {len(ordered) - 5} more" if len(ordered) > 5 else "")
