"""OpenCL and WebGPU kernels one by one against the interpreter, and row by row; what is refused, by name."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from inferloom.ir.errors import UnsupportedError
from inferloom.ir.graph import Builder, Value
from inferloom.ir.types import DType
from tests.targets import attention_cases, row_cases
from tests.targets.cross.device import SourceKernels
from tests.targets.cross.test_source import DEVICES
from tests.targets.single import TOKENS, Body, alone, graph, random_inputs, tensor
from tests.targets.tvm.test_attention import pack, tiles
from tests.targets.tvm.test_matmul import BODIES

ROWS, ATTENTION = row_cases.CASES, {name: attention_cases.body(case) for name, case in attention_cases.CASES.items()}
COUNTS = {"tokens": 11, "rows": 3}


def needs_more(body: Body) -> bool:
    """Whether a body has elements of 16 bits."""
    made = graph(body)
    return any(getattr(v.type, "dtype", None) is DType.BF16 for v in (*made.inputs, *(r for n in made.nodes for r in n.results)))


def lowers(kind: str, name: str, body: Body) -> bool:
    case = attention_cases.CASES[name] if kind == "attention" else None
    return not needs_more(body) and not (case is not None and (case.latent or case.chosen >= 0))


ALL = [(kind, name, body) for kind, bodies in (("row", ROWS), ("matmul", BODIES), ("attention", ATTENTION))
       for name, body in bodies.items()]


@pytest.mark.slow
@pytest.mark.parametrize("chip", DEVICES)
@pytest.mark.parametrize("kind,name,body", [a for a in ALL if lowers(*a)], ids=[f"{k}-{n}" for k, n, b in ALL if lowers(k, n, b)])
def test_matches_reference_and_rows_are_independent(kind: str, name: str, body: Body, chip: str) -> None:
    kernels = SourceKernels(kind, {name: body}, DEVICES[chip], chip)
    if kind == "attention":
        batch = attention_cases.Batch(attention_cases.CASES[name])
        pool = {"state": pack(batch.state, batch.state.type.bytes_per_block + 128)}
        inputs = batch.inputs() | pool
        (got,) = kernels.run(name, inputs, {"tokens": len(batch.q), "seqs": 3}, {"q_tiles": tiles(batch.starts)})
        (want,) = kernels.want(name, inputs | {"state": batch.state})
        assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()
        for seq, token in ((0, 0), (1, 7), (2, 17)):
            one = kernels.run(name, batch.one(seq, token) | pool, {"tokens": 1, "seqs": 1}, {"q_tiles": np.array([[0, 0, 1]])})
            assert np.array_equal(one[0][0], got[batch.starts[seq] + token])
        return
    if (name, chip) == ("empty_max", "webgpu"):
        return  # its largest element is minus infinity, which WGSL does not have
    made, dim = kernels.graphs[name], "rows" if name == "softcap" else "tokens"
    inputs = random_inputs(made, COUNTS, seed=1)
    got = kernels.check(name, inputs, COUNTS)
    if name != "gather":
        single = kernels.run(name, alone(inputs, made, 2), {dim: 1})
        assert all(np.array_equal(whole[2], x[0], equal_nan=True) for whole, x in zip(got, single, strict=True))


@pytest.mark.parametrize("kind,name,body", [a for a in ALL if not lowers(*a)],
                         ids=[f"{k}-{n}" for k, n, b in ALL if not lowers(k, n, b)])
def test_what_is_refused(kind: str, name: str, body: Body) -> None:
    with pytest.raises(UnsupportedError, match="opencl|source"):
        SourceKernels(kind, {name: body}, DEVICES["opencl"], "opencl")


def test_rows_that_do_not_fit_are_refused() -> None:
    def body(b: Builder) -> Sequence[Value]:
        x = b.input("x", tensor(TOKENS, 5000, 2))
        return [b.emit("sum", x, axes=(2,), loc="model.py:7")]

    with pytest.raises(UnsupportedError, match="20000 bytes.*16384"):
        SourceKernels("row", {"k": body}, DEVICES["opencl"], "opencl")
