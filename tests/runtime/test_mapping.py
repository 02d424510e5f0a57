"""Weights that are mapped: at once there, never another's bytes, copied while they are read."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3

from inferloom.runtime import mapping
from inferloom.runtime.errors import ArtifactError
from inferloom.runtime.manifest import FileInfo
from inferloom.runtime.mapping import MappedFile
from inferloom.runtime.safetensors import write
from inferloom.runtime.weights import load_weights

SIZE = (3 << 23) + 12345  # several pieces, the last of which is no whole number of pages


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A file of random bytes, small enough for a test and yet mapped, where the system has leases."""
    monkeypatch.setattr(mapping, "LEAST", 1)
    monkeypatch.setattr(mapping, "POLL", 0.01)
    path = tmp_path / "file"
    path.write_bytes(np.random.default_rng().bytes(SIZE))
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.fcntl(fd, fcntl.F_SETSIG, 23)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError as error:
        pytest.skip(f"no leases here: {error}")
    finally:
        os.close(fd)
    return path


def mapped(path: Path) -> MappedFile:
    found = MappedFile.open(path, SIZE)
    assert found is not None
    return found


def is_mapped(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text()


def may_write(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
    except OSError as error:
        assert error.errno == errno.EWOULDBLOCK
        return False
    return True


def until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_who_writes_waits_until_the_bytes_are_copied(file):
    good = file.read_bytes()
    found = mapped(file)
    assert is_mapped(file) and found.bytes.tobytes() == good
    with file.open("r+b") as other:  # returns once the lease is given back
        other.write(bytes(SIZE))
        assert not is_mapped(file)
    assert found.bytes.tobytes() == good and file.read_bytes() != good
    found.check()


def test_who_cuts_it_short_waits_too(file):
    good = file.read_bytes()
    found = mapped(file)
    os.truncate(file, 10)
    assert found.bytes.tobytes() == good


def test_it_is_copied_by_itself_when_all_is_calm_while_others_read(file, monkeypatch):
    monkeypatch.setattr(mapping, "CALM", 0.05)
    good = blake3(file.read_bytes()).digest()
    found, wrong, stop = mapped(file), [], threading.Event()

    def read():
        while not stop.is_set():
            if blake3(memoryview(found.bytes)).digest() != good:
                wrong.append(1)

    reader = threading.Thread(target=read)
    reader.start()
    until(lambda: not is_mapped(file))
    until(lambda: may_write(file))
    stop.set()
    reader.join()
    assert not wrong and blake3(memoryview(found.bytes)).digest() == good


def test_what_is_dropped_is_unmapped_and_its_lease_given_back(file):
    found = mapped(file)
    assert is_mapped(file)
    del found
    assert not is_mapped(file) and may_write(file)


def test_no_memory_for_a_copy_is_an_error_only_if_someone_writes(file, monkeypatch):
    def none(self, at):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(mapping._Region, "_copy", none)
    monkeypatch.setattr(mapping, "CALM", 0.02)
    found = mapped(file)
    time.sleep(0.1)
    found.check()
    assert is_mapped(file) and not may_write(file)  # this asked for it
    with pytest.raises(ArtifactError, match="being written to.*Cannot allocate memory"):
        until(lambda: found.check())


@pytest.mark.parametrize("why", ["small", "large", "another size", "absent", "link", "open for writing", "not in memory"])
def test_it_is_rather_read(file, monkeypatch, why):
    size, path = SIZE, file
    if why == "small":
        monkeypatch.setattr(mapping, "LEAST", SIZE + 1)
    elif why == "large":
        monkeypatch.setattr(mapping, "MOST", SIZE - 1)
    elif why == "another size":
        size -= 1
    elif why == "absent":
        path = file.with_name("absent")
    elif why == "link":
        path = file.with_name("link")
        path.symlink_to(file)
    elif why == "not in memory":
        monkeypatch.setattr(mapping, "RESIDENT", 1.1)
    other = file.open("r+b") if why == "open for writing" else None
    assert MappedFile.open(path, size) is None
    assert not is_mapped(file)
    if other is not None:
        other.close()
    assert may_write(file)


def test_mapped_weights_are_verified(file, tmp_path):
    path, values = tmp_path / "w.safetensors", np.random.default_rng().bytes(1 << 20)
    header = write(path, [("a", "U8", (1 << 20,))], [values])
    data = path.read_bytes()
    info = FileInfo(len(data), blake3(data).hexdigest())
    weights = load_weights(path, info, header.data_offset)
    weights.check()
    assert isinstance(weights.memory, MappedFile) and weights.address % 64 == 0
    assert weights.memory.bytes[header.data_offset:].tobytes() == values
    del weights
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ArtifactError, match="damaged"):
        load_weights(path, info, header.data_offset)
    assert not is_mapped(path)
