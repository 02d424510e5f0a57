"""ONNX decoders made by hand, as onnxruntime-genai's builder makes them, and references to compare with."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

MICROSOFT = "com.microsoft"
VOCAB, WIDTH, HEADS, SHARED, DIM, INNER, LENGTH = 131, 64, 4, 2, 16, 96, 64


@dataclass
class Net:
    """Collects nodes, tensors and inputs; each method returns the name of what it makes."""

    opset: int = 21
    nodes: list[Any] = field(default_factory=list)
    tensors: list[Any] = field(default_factory=list)
    inputs: list[Any] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    count: int = 0

    def name(self, stem: str) -> str:
        self.count += 1
        return f"{stem}_{self.count}"

    def input(self, name: str, dtype: int, shape: list[Any]) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def output(self, name: str, dtype: int, shape: list[Any]) -> None:
        self.outputs.append(helper.make_tensor_value_info(name, dtype, shape))

    def tensor(self, array: Any, stem: str = "const") -> str:
        name = self.name(stem)
        self.tensors.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def weight(self, *shape: int, gain: float = 1.0, stem: str = "w") -> str:
        scale = gain / np.sqrt(shape[0]) if len(shape) > 1 else 0.2
        return self.tensor((self.rng.standard_normal(shape) * scale + (len(shape) == 1)).astype(np.float32), stem)

    def op(self, kind: str, *inputs: str, outputs: int | list[str] = 1, domain: str = "", **attrs: Any) -> Any:
        names = outputs if isinstance(outputs, list) else [self.name(kind.lower()) for _ in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, name=f"node_{names[0]}", domain=domain, **attrs))
        return names[0] if len(names) == 1 else names

    def ms(self, kind: str, *inputs: str, outputs: int | list[str] = 1, **attrs: Any) -> Any:
        return self.op(kind, *inputs, outputs=outputs, domain=MICROSOFT, **attrs)

    def model(self) -> Any:
        graph = helper.make_graph(self.nodes, "by_hand", self.inputs, self.outputs, self.tensors)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset), helper.make_opsetid(MICROSOFT, 1)],
                                 ir_version=10)

    def save(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        onnx.save(self.model(), folder / "model.onnx")
        return folder / "model.onnx"


def caches(length: int = LENGTH, dim: int = DIM) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin f32 [length, dim / 2]."""
    angles = np.arange(length)[:, None] * 10000.0 ** (-np.arange(0, dim, 2) / dim)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def genai(*, packed: bool = False, inner_rotary: bool = True, window: int = -1, softcap: float = 0.0, layers: int = 2,
          bits: int = 0, sinks: bool = False, **attention: Any) -> Net:
    """A llama as onnxruntime-genai's builder writes it: GroupQueryAttention with shared lengths, skip norms, silu."""
    net = Net()
    net.input("input_ids", TensorProto.INT64, ["batch_size", "sequence_length"])
    net.input("attention_mask", TensorProto.INT64, ["batch_size", "total_sequence_length"])
    if not inner_rotary:
        net.input("position_ids", TensorProto.INT64, ["batch_size", "sequence_length"])
    cos, sin = (net.tensor(t, n) for t, n in zip(caches(), ("cos_cache", "sin_cache")))
    one, last = net.tensor(np.array([1], np.int64)), net.tensor(np.array(1, np.int64))
    total = net.op("ReduceSum", "attention_mask", one, keepdims=1)
    seqlens = net.op("Cast", net.op("Sub", total, one), to=TensorProto.INT32)
    keys = net.op("Cast", net.op("Gather", net.op("Shape", "attention_mask"), last, axis=0), to=TensorProto.INT32)

    def linear(x: str, k: int, n: int) -> str:
        if not bits:
            return net.op("MatMul", x, net.weight(k, n))
        blob = net.tensor(net.rng.integers(0, 256, (n, k // 16, 16 * bits // 8), dtype=np.uint8), "blob")
        scales = net.tensor((net.rng.random(n * k // 16) * 0.2 * 2.0 ** (4 - bits) + 0.01).astype(np.float32), "scales")
        return net.ms("MatMulNBits", x, blob, scales, K=k, N=n, bits=bits, block_size=16)

    hidden = net.op("Gather", net.weight(VOCAB, WIDTH, gain=6.0), "input_ids")
    norm = net.op("SimplifiedLayerNormalization", hidden, net.weight(WIDTH), axis=-1, epsilon=1e-5, stash_type=1)
    for layer in range(layers):
        past = [net.input(f"past_key_values.{layer}.{x}", TensorProto.FLOAT, ["batch_size", SHARED, "past_sequence_length", DIM])
                for x in ("key", "value")]
        present = [f"present.{layer}.{x}" for x in ("key", "value")]
        for name in present:
            net.output(name, TensorProto.FLOAT, ["batch_size", SHARED, "total_sequence_length", DIM])
        q, k, v = (linear(norm, WIDTH, n * DIM) for n in (HEADS, SHARED, SHARED))
        if not inner_rotary:
            q, k = (net.ms("RotaryEmbedding", x, "position_ids", cos, sin, num_heads=n) for x, n in ((q, HEADS), (k, SHARED)))
        qkv = [net.op("Concat", q, k, v, axis=-1), "", ""] if packed else [q, k, v]
        extra = [net.tensor(net.rng.standard_normal(HEADS).astype(np.float32), "sinks")] if sinks else []
        tail = [cos, sin] if inner_rotary else ["", ""] if extra else []
        made = net.ms("GroupQueryAttention", *qkv, *past, seqlens, keys, *tail, *(["", "", *extra] if extra else []),
                      outputs=[net.name("attn"), *present], num_heads=HEADS, kv_num_heads=SHARED, do_rotary=int(inner_rotary),
                      local_window_size=window, softcap=softcap, **attention)[0]
        norm, _, _, hidden = net.ms("SkipSimplifiedLayerNormalization", hidden, linear(made, HEADS * DIM, WIDTH),
                                    net.weight(WIDTH), outputs=[net.name("norm"), "", "", net.name("sum")], epsilon=1e-5)
        gate, up = linear(norm, WIDTH, INNER), linear(norm, WIDTH, INNER)
        made = net.op("Mul", net.op("Mul", gate, net.op("Sigmoid", gate)), up)
        norm, _, _, hidden = net.ms("SkipSimplifiedLayerNormalization", hidden, linear(made, INNER, WIDTH), net.weight(WIDTH),
                                    outputs=[net.name("norm"), "", "", net.name("sum")], epsilon=1e-5)
    net.op("MatMul", norm, net.weight(WIDTH, VOCAB), outputs=["logits"])
    net.output("logits", TensorProto.FLOAT, ["batch_size", "sequence_length", VOCAB])
    return net


def onnxruntime_logits(path: Path, ids: np.ndarray) -> np.ndarray:
    """f32 [tokens, vocabulary] of one whole sequence, by onnxruntime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feeds: dict[str, np.ndarray] = {}
    for given in session.get_inputs():
        if given.name == "input_ids":
            feeds[given.name] = ids[None].astype(np.int64)
        elif given.name == "attention_mask":
            feeds[given.name] = np.ones((1, len(ids)), np.int64)
        elif given.name == "position_ids":
            feeds[given.name] = np.arange(len(ids), dtype=np.int64)[None]
        else:
            feeds[given.name] = np.zeros([d if isinstance(d, int) else 1 if i == 0 else 0
                                          for i, d in enumerate(given.shape)], np.float32)
    return session.run(["logits"], feeds)[0][0]


def mha(unidirectional: bool) -> Net:
    """One layer of MultiHeadAttention of onnxruntime, causal by its attribute or by a mask that the graph computes."""
    net = Net()
    net.input("input_ids", TensorProto.INT64, ["batch_size", "sequence_length"])
    past = [net.input(f"past_key_values.0.{x}", TensorProto.FLOAT, ["batch_size", HEADS, "past_sequence_length", DIM])
            for x in ("key", "value")]
    x = net.op("Gather", net.weight(VOCAB, WIDTH, gain=6.0), "input_ids")
    mask = ""
    if not unidirectional:
        zero, one = net.tensor(np.array(0, np.int64)), net.tensor(np.array(1, np.int64))
        steps, done = (net.op("Squeeze", net.op("Shape", n, start=a, end=a + 1)) for n, a in (("input_ids", 1), (past[0], 2)))
        total = net.op("Add", steps, done)
        queries = net.op("Unsqueeze", net.op("Range", done, total, one), net.tensor(np.array([0, 1, 3], np.int64)))
        keys = net.op("Unsqueeze", net.op("Range", zero, total, one), net.tensor(np.array([0, 1, 2], np.int64)))
        hidden = net.op("Greater", keys, queries)
        mask = net.op("Where", hidden, net.tensor(np.float32(np.finfo(np.float32).min)), net.tensor(np.float32(0)))
    q, k, v = (net.op("MatMul", x, net.weight(WIDTH, WIDTH)) for _ in range(3))
    made = net.ms("MultiHeadAttention", q, k, v, "", "", mask, *past, num_heads=HEADS, unidirectional=int(unidirectional),
                  outputs=[net.name("attn"), "present.0.key", "present.0.value"])[0]
    net.op("MatMul", net.op("Add", x, made), net.weight(WIDTH, VOCAB), outputs=["logits"])
    for name in ("key", "value"):
        net.output(f"present.0.{name}", TensorProto.FLOAT, ["batch_size", HEADS, "total_sequence_length", DIM])
    net.output("logits", TensorProto.FLOAT, ["batch_size", "sequence_length", VOCAB])
    return net


def attention_node(net: Net) -> Any:
    """The first GroupQueryAttention."""
    return next(n for n in net.nodes if n.op_type == "GroupQueryAttention")


def run(traced: Any, tokens: np.ndarray) -> np.ndarray:
    """f32 [tokens, vocabulary] of one whole sequence, by the NumPy references of the imported graph."""
    from inferloom.ir.interpret import interpret
    from inferloom.ir.verify import verify

    verify(traced.graph, "model")
    params = {p.source: np.asarray(traced.weights.load(p.source), p.value.type.dtype.numpy) for p in traced.graph.params}
    places = np.arange(len(tokens), dtype=np.int32)
    return interpret(traced.graph, {"tokens": tokens, "positions": places, "logit_rows": places}, params)[0]
