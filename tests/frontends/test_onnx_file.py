"""Damaged and hostile ONNX files: each is refused with what is wrong, where, and what to do."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from inferloom.compiler.frontends.onnx import loader as front_end
from inferloom.compiler.frontends.onnx.file import files_of, read_graph
from inferloom.compiler.frontends.paths import is_onnx
from inferloom.ir.errors import UnsupportedError
from tests.frontends.onnx_graphs import VOCAB, Net, genai, onnxruntime_logits, run


def tiny() -> Net:
    """Embedding and output projection; no attention."""
    net = Net()
    net.input("input_ids", TensorProto.INT64, ["batch", "tokens"])
    x = net.op("Gather", net.weight(VOCAB, 8, stem="table"), "input_ids")
    net.op("MatMul", x, net.weight(8, VOCAB, stem="head"), outputs=["logits"])
    net.output("logits", TensorProto.FLOAT, ["batch", "tokens", VOCAB])
    return net


def external(folder: Path) -> tuple[Path, Any]:
    """`tiny` with its tensors in weights.bin, and its proto."""
    folder.mkdir(parents=True)
    model = tiny().model()
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    return folder / "model.onnx", onnx.load(folder / "model.onnx", load_external_data=False)


def refused(path: Path, match: str, max_model_len: int | None = 32) -> None:
    with pytest.raises(UnsupportedError, match=match):
        traced = front_end.load(path, max_model_len)
        for source in traced.weights.names():
            traced.weights.load(source)


def place(tensor: Any, **keys: Any) -> None:
    for entry in tensor.external_data:
        if entry.key in keys:
            entry.value = str(keys[entry.key])


def test_external_data_is_mapped(tmp_path: Path) -> None:
    path, _ = external(tmp_path / "m")
    traced = front_end.load(path, 32)
    array = traced.weights.load("table_1")
    assert isinstance(array.base, np.memmap) or isinstance(array, np.memmap)
    ids = np.arange(9, dtype=np.int32)
    assert np.allclose(run(traced, ids), onnxruntime_logits(path, ids), atol=1e-5)
    assert [p.name for p in files_of(path)] == ["model.onnx", "weights.bin"]
    assert is_onnx(path) and is_onnx(path.parent)


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "a/../../secret", "", "link"])
def test_external_data_outside_of_the_folder(location: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(1 << 16))
    path, model = external(tmp_path / "m")
    os.symlink(tmp_path / "secret", tmp_path / "m" / "link")
    place(model.graph.initializer[0], location=location)
    onnx.save(model, path)
    refused(path, "outside of the model's folder")
    with pytest.raises(UnsupportedError, match="outside of the model's folder"):
        files_of(path)


@pytest.mark.parametrize("change, match", [
    ({"location": "gone.bin"}, "which is not there"),
    ({"offset": 1 << 40}, "needs 4192 bytes, and should lie at"),
    ({"offset": -4}, "should lie at -4"),
    ({"length": 12}, "needs 4192 bytes"),
    ({"offset": "x"}, "damaged place"),
], ids=str)
def test_external_data_that_is_not_there(change: dict[str, Any], match: str, tmp_path: Path) -> None:
    path, model = external(tmp_path / "m")
    place(model.graph.initializer[0], **change)
    onnx.save(model, path)
    refused(path, match)


def _cycle(net: Net) -> None:
    net.nodes[0].input[1] = "logits"


def _unknown_input(net: Net) -> None:
    net.nodes[1].input[1] = "nowhere"


def _twice(net: Net) -> None:
    net.nodes[1].output[0] = net.nodes[0].output[0]


def _no_output(net: Net) -> None:
    net.outputs[0].name = "absent"


def _strings(net: Net) -> None:
    net.tensors[0] = helper.make_tensor(net.tensors[0].name, TensorProto.STRING, [1], [b"x"])


def _short(net: Net) -> None:
    net.tensors[0].raw_data = net.tensors[0].raw_data[:-4]


def _negative(net: Net) -> None:
    net.tensors[0].dims[0] = -1


def _float_ids(net: Net) -> None:
    net.inputs[0] = helper.make_tensor_value_info("input_ids", TensorProto.FLOAT, ["b", "t"])


def _fixed_length(net: Net) -> None:
    net.inputs[0] = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["b", 128])


def _batch_of_four(net: Net) -> None:
    net.inputs[0] = helper.make_tensor_value_info("input_ids", TensorProto.INT64, [4, "t"])


def _shapes_differ(net: Net) -> None:
    net.tensors[1] = numpy_helper.from_array(np.zeros((9, VOCAB), np.float32), net.tensors[1].name)


def _unknown_operator(net: Net) -> None:
    net.nodes[1].op_type = "Conv"


def _last_token_only(net: Net) -> None:
    net.nodes.pop()
    last = net.op("Gather", net.nodes[0].output[0], net.tensor(np.array([-1], np.int64)), axis=1)
    net.op("MatMul", last, net.tensors[1].name, outputs=["logits"])


def _small_table(net: Net) -> None:
    net.tensors[0] = numpy_helper.from_array(np.zeros((100, 8), np.float32), net.tensors[0].name)


def _control_flow(net: Net) -> None:
    branch = helper.make_graph([helper.make_node("Identity", [net.nodes[0].output[0]], ["chosen"])], "branch", [],
                               [helper.make_tensor_value_info("chosen", TensorProto.FLOAT, None)])
    net.nodes[1].input[0] = net.name("either")
    flag = net.tensor(np.array(True))
    net.nodes.insert(1, helper.make_node("If", [flag], [net.nodes[1].input[0]], then_branch=branch, else_branch=branch))


def _huge_range(net: Net) -> None:
    bounds = [net.tensor(np.array(v, np.int64)) for v in (0, 1 << 60, 1)]
    x = net.op("Range", *bounds)
    net.nodes.insert(0, net.nodes.pop())
    net.nodes[1].input[1] = x


CASES: dict[Callable[[Net], None], str] = {
    _cycle: "only a later node makes: the nodes are in a cycle",
    _unknown_input: r"MatMul \(node 'node_logits'\) reads 'nowhere', which is neither an input, a tensor nor made",
    _twice: "which exists already", _no_output: "nothing makes the output 'absent'",
    _strings: "element type STRING, which is not supported", _short: "is damaged", _negative: "has the shape",
    _float_ids: "has no input `input_ids`", _fixed_length: "a fixed length of 128; export with a dynamic number of tokens",
    _batch_of_four: "with a batch of any size or of one", _shapes_differ: r"MatMul \(node 'node_logits'\)",
    _unknown_operator: r"Conv \(node 'node_logits'\): unknown operator", _last_token_only: "export logits of all of them",
    _small_table: "has 100 rows, fewer than the 131 logits",
    _control_flow: r"If \(the node that makes 'either_4'\) has branches or loops",
    _huge_range: r"Range .*: an array of shape \[1152921504606846976\] would have to be evaluated"}


@pytest.mark.parametrize("damage", CASES, ids=lambda f: f.__name__)
def test_damaged_graphs(damage: Callable[[Net], None], tmp_path: Path) -> None:
    net = tiny()
    damage(net)
    refused(net.save(tmp_path), CASES[damage])


def test_not_an_onnx_file(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    for data, match in ((b"\x93 not protobuf", "is not an ONNX model"), (b"", "no opset or no output")):
        path.write_bytes(data)
        refused(path, match)
    other = tiny()
    other.opset = 9
    refused(other.save(tmp_path / "old"), "uses opset 9; 11 to .*: export it again")
    (tmp_path / "two").mkdir()
    for name in ("a.onnx", "b.onnx"):
        (tmp_path / "two" / name).write_bytes(b"")
    refused(tmp_path / "two", r"holds 2 ONNX files and none is called model.onnx: name one \(a.onnx, b.onnx\)")


def test_functions_are_written_out_and_recursion_is_refused(tmp_path: Path) -> None:
    net = tiny()
    model = net.model()
    x = model.graph.node[0].output[0]
    opset = [helper.make_opsetid("", net.opset)]
    double = helper.make_function("own", "Double", ["x"], ["y"], [helper.make_node("Add", ["x", "x"], ["y"])], opset)
    model.graph.node.insert(1, helper.make_node("Double", [x], ["twice"], domain="own"))
    model.graph.node[2].input[0] = "twice"
    model.opset_import.append(helper.make_opsetid("own", 1))
    model.functions.append(double)
    onnx.save(model, tmp_path / "model.onnx")
    ids = np.arange(5, dtype=np.int32)
    assert np.allclose(run(front_end.load(tmp_path, 32), ids), onnxruntime_logits(tmp_path / "model.onnx", ids), atol=1e-5)
    model.functions[0].node[0].CopyFrom(helper.make_node("Double", ["x"], ["y"], domain="own"))
    onnx.save(model, tmp_path / "model.onnx")
    refused(tmp_path, "call each other in a cycle: Double")


def test_static_caches_are_refused(tmp_path: Path) -> None:
    net = genai()
    for i, given in enumerate(net.inputs):
        if given.name.startswith("past_key_values"):
            net.inputs[i] = helper.make_tensor_value_info(given.name, TensorProto.FLOAT, ["batch_size", 2, 64, 16])
    refused(net.save(tmp_path), r"past_key_values.0.key.* is not a cache that grows")


def test_every_operator_and_place_is_kept(tmp_path: Path) -> None:
    graph = read_graph(genai().save(tmp_path))
    assert graph.opset == 21 and len(graph.ops) == len(genai().nodes)
    assert str(next(op for op in graph.ops if op.type == "GroupQueryAttention")).startswith(
        "com.microsoft.GroupQueryAttention (node 'node_attn_")
