"""Making an artifact appear whole or not at all."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from inferloom.runtime.errors import ArtifactError
from inferloom.runtime.manifest import MANIFEST, SEAL


@contextmanager
def staging(final: str | os.PathLike[str]) -> Iterator[Path]:
    """A new folder beside `final`, to be filled and published; it is removed unless it was published.

    A staging folder is locked while its process lives. What killed processes left behind is cleaned up first.
    """
    target = Path(final).absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target.parent):
        _clean(target)
        folder = target.parent / f".{target.name}.staging-{secrets.token_hex(4)}"
        folder.mkdir()
        lock = os.open(folder, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # not there any more when it was published
        os.close(lock)


def publish(folder: str | os.PathLike[str], final: str | os.PathLike[str]) -> None:
    """Rename a sealed folder to `final`, replacing an artifact that is there.

    ArtifactError when `folder` is not sealed, or when `final` is something other than an artifact or an empty
    folder: nothing else is ever deleted. A crash leaves the old artifact, the new one, or (between two renames)
    the old one set aside, which the next `staging` puts back.
    """
    source, target = Path(folder).absolute(), Path(final).absolute()
    if not (source / SEAL).is_file():
        raise ArtifactError(f"{source} is not sealed: seal it before publishing")
    with _locked(target.parent):
        for sub, _, _ in os.walk(source):
            _sync(Path(sub))
        aside = None
        if target.is_symlink() or target.exists():
            if target.is_symlink() or not target.is_dir() or not _is_artifact(target) and any(target.iterdir()):
                raise ArtifactError(f"{target} exists and is not an artifact: choose another place, or remove it")
            aside = target.parent / f".{target.name}.old-{secrets.token_hex(4)}"
            target.rename(aside)
        try:
            source.rename(target)
        except BaseException:
            if aside is not None:
                aside.rename(target)
            raise
        _sync(target.parent)
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)


def _is_artifact(folder: Path) -> bool:
    return (folder / SEAL).is_file() and (folder / MANIFEST).is_file()


def _clean(target: Path) -> None:
    for old in target.parent.glob(f".{_escape(target.name)}.old-*"):
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(target)
    for stale in target.parent.glob(f".{_escape(target.name)}.staging-*"):
        fd = os.open(stale, os.O_RDONLY)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(stale, ignore_errors=True)
        except BlockingIOError:
            pass  # a living process works there
        finally:
            os.close(fd)


def _escape(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
