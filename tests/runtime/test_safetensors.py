import json
import struct

import numpy as np
import pytest

from inferloom.runtime import safetensors
from inferloom.runtime.errors import ArtifactError

ENTRIES = [("b", "F32", (2, 3)), ("a", "BF16", (32,)), ("empty", "U8", (0, 4)), ("scalar", "I32", ())]
BUFFERS = [np.arange(6, dtype=np.float32).tobytes(), bytes(range(64)), b"", memoryview(b"\1\0\0\0")]


def file_of(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(begin: int, end: int, dtype: object = "U8", shape: object = None) -> dict:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def test_round_trip_aligned_and_deterministic(tmp_path):
    path, again = tmp_path / "a", tmp_path / "b"
    written = safetensors.write(path, ENTRIES, iter(BUFFERS))
    safetensors.write(again, ENTRIES, iter(BUFFERS))
    header = safetensors.read_header(path)
    assert path.read_bytes() == again.read_bytes()
    assert header == written
    assert header.data_offset % 64 == 0
    assert list(header.tensors) == [name for name, _, _ in ENTRIES]
    data = path.read_bytes()[header.data_offset :]
    for (name, _, _), buffer in zip(ENTRIES, BUFFERS):
        assert data[header.tensors[name].begin : header.tensors[name].end] == bytes(buffer)


def test_reference_implementation_reads_it(tmp_path):
    reference = pytest.importorskip("safetensors.numpy")
    entries = [e for e in ENTRIES if e[1] != "BF16"]
    safetensors.write(tmp_path / "m", entries, [b for e, b in zip(ENTRIES, BUFFERS) if e[1] != "BF16"])
    found = reference.load_file(tmp_path / "m")
    np.testing.assert_array_equal(found["b"], np.arange(6, dtype=np.float32).reshape(2, 3))


@pytest.mark.parametrize("data, message", [
    (b"", "too few"),
    (b"\1\2\3", "too few"),
    (file_of({}, length=2**63), "over the limit"),
    (file_of({}, length=100), "does not fit"),
    (file_of(b"{"), "not JSON"),
    (file_of(b"\xff\xfe"), "not JSON"),
    (file_of(b"[" * 100_000), "not JSON"),
    (file_of([]), "not a JSON object"),
    (file_of(b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":1}'), "twice"),
    (file_of({"__metadata__": {"x": 1}}), "__metadata__"),
    (file_of({"a": 3}), "exactly dtype"),
    (file_of({"a": tensor(0, 1) | {"more": 1}}, b"x"), "exactly dtype"),
    (file_of({"a": tensor(0, 1, "U9")}, b"x"), "unknown dtype 'U9'"),
    (file_of({"a": tensor(0, 1, ["U8"])}, b"x"), "unknown dtype"),
    (file_of({"a": tensor(0, 1, shape=[True])}, b"x"), "shape"),
    (file_of({"a": tensor(0, 1, shape=[-1])}, b"x"), "shape"),
    (file_of({"a": tensor(0, 1, shape=[1.0])}, b"x"), "shape"),
    (file_of({"a": tensor(0, 1, shape=[2**60, 2**60])}, b"x"), "shape"),
    (file_of({"a": tensor(-1, 0)}, b"x"), "data_offsets"),
    (file_of({"a": tensor(0, 2, shape=[3])}, b"xx"), "takes 3 bytes, but its offsets span 2"),
    (file_of({"a": tensor(0, 2), "b": tensor(1, 3)}, b"xxx"), "overlap"),
    (file_of({"a": tensor(0, 1), "b": tensor(2, 3)}, b"xxx"), "hole"),
    (file_of({"a": tensor(0, 4)}, b"xxx"), "take 4 bytes, but the data section has 3"),
    (file_of({"a": tensor(0, 2)}, b"xxx"), "take 2 bytes, but the data section has 3"),
])
def test_refusals_of_reader(tmp_path, data, message):
    path = tmp_path / "m.safetensors"
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=message):
        safetensors.read_header(path)


def test_every_truncation_is_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    safetensors.write(path, ENTRIES, BUFFERS)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ArtifactError):
            safetensors.read_header(path)


@pytest.mark.parametrize("entries, buffers, message", [
    (ENTRIES, BUFFERS[:3], "no buffer for tensor 'scalar'"),
    (ENTRIES, [*BUFFERS, b""], "more buffers"),
    ([("a", "F32", (2,))], [b"1234"], "takes 8 bytes, its buffer has 4"),
    ([("a", "F99", (2,))], [b"1234"], "unknown dtype"),
    ([("a", "U8", (1,))] * 2, [b"1", b"2"], "twice"),
])
def test_refusals_of_writer_leave_no_file(tmp_path, entries, buffers, message):
    with pytest.raises(ArtifactError, match=message):
        safetensors.write(tmp_path / "m", entries, buffers)
    assert not (tmp_path / "m").exists()


def test_writer_holds_one_tensor_at_a_time(tmp_path):
    alive = 0

    class Buffer(bytearray):
        def __init__(self, n):
            nonlocal alive
            super().__init__(n)
            alive += 1
            assert alive <= 2  # the one being made and at most the one just written

        def __del__(self):
            nonlocal alive
            alive -= 1

    safetensors.write(tmp_path / "m", [(str(i), "U8", (64,)) for i in range(8)], (Buffer(64) for _ in range(8)))
