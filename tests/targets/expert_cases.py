"""Linear layers by expert: bodies that code generators share. Few and many rows, sizes that fill tiles and do not."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from inferloom.ir import op as ops
from inferloom.ir.graph import Builder, Value
from inferloom.ir.types import DType
from tests.targets.single import TOKENS, Bodies, Body, random_inputs, tensor

COUNTS = (1, 2, 7, 33)


def experts(number: int, n: int, k: int, choices: int, tile: int, pair: int, k_multiple: int, each: bool = False,
            bias: bool = False, dtype: DType = DType.F32) -> Body:
    """`each`: a token's choices have a row each. Results are in `dtype`."""

    def emit(b: Builder) -> Sequence[Value]:
        x = b.input("x", tensor(TOKENS, choices if each else 1, k, dtype=dtype))
        steps = -(-k // k_multiple) * k_multiple // pair
        packed = b.input("packed", tensor(number, -(-n // tile), steps, tile, pair, dtype=dtype))
        choice = b.input("choice", tensor(TOKENS, choices, dtype=DType.I32))
        extra = [b.input("bias", tensor(number, n))] if bias else []
        made = b.emit("packed_expert_linear", x, packed, choice, *extra, n=n, k=k)
        return [made if dtype is DType.F32 else b.emit("cast", made, dtype=dtype)]

    return emit


def bodies(tile: int, pairs: dict[DType, int], k_multiple: int) -> dict[str, Body]:
    """Bodies for weights packed as a target wants them."""

    def made(number: int, n: int, k: int, choices: int, each: bool = False, bias: bool = False,
             dtype: DType = DType.F32) -> Body:
        return experts(number, n, k, choices, tile, pairs[dtype], k_multiple, each, bias, dtype)

    return {"up": made(5, 128, 64, 2), "down_bias": made(5, 64, 96, 3, each=True, bias=True), "odd": made(3, 70, 40, 1),
            "odd_each": made(4, 33, 72, 2, each=True), "bf16": made(6, 192, 64, 4, dtype=DType.BF16),
            "bf16_each": made(6, 64, 96, 4, each=True, bias=True, dtype=DType.BF16)}


def check(kernels: Bodies, name: str, exact: bool = True) -> None:
    """Against the reference; and each token gets the bits (if `exact`) that it gets alone, whatever the others chose."""
    made = kernels.graphs[name]
    node = next(n for n in made.nodes if n.op == "packed_expert_linear")
    shapes = {v.name: v.type.shape for v in made.inputs}  # type: ignore[union-attr]
    number, n, k = int(str(shapes["packed"][0])), int(str(node.attrs["n"])), int(str(node.attrs["k"]))
    for count in COUNTS:
        inputs = random_inputs(made, {"tokens": count}, seed=count, high=number)
        tile, pair = (int(str(d)) for d in shapes["packed"][3:])
        real = {"tile": tile, "pair": pair, "k_multiple": int(str(shapes["packed"][2])) * pair}
        raw = np.random.default_rng(count).standard_normal((number, n, k)).astype(np.float32)
        (packed,) = ops.run_reference("pack_experts", [raw], ops.get("pack_experts").check_attrs(real))
        bf16 = made.outputs[0].type.dtype is DType.BF16  # type: ignore[union-attr]
        inputs["packed"] = (packed.view(np.uint32) & 0xFFFF0000).view(np.float32) if bf16 else packed
        got = kernels.check(name, inputs, {"tokens": count})[0]
        for row in {0, count // 2, count - 1} if exact else ():
            alone = {name: x[row:row + 1] if name in ("x", "choice") else x for name, x in inputs.items()}
            assert np.array_equal(kernels.run(name, alone, {"tokens": 1})[0][0], got[row])
