"""Goldens of the passes from lower-attention down: the text after each, on one layer of a small Llama in bf16.

`python -m tests.compiler.test_lowering_goldens` rewrites them; look at the difference. That the passes keep the
graph's meaning is checked in test_lowering.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from inferloom.compiler.passes import (
    bind_dims,
    group_kernels,
    lower_attention,
    lower_precision,
    pack_weights,
    page_state,
)
from inferloom.compiler.report import Report
from inferloom.ir.graph import Graph
from inferloom.ir.text import parse_graph, print_graph, same_graph
from inferloom.ir.types import DType
from inferloom.ir.verify import verify
from tests.compiler.graphs import tiny_llama

FOLDER = Path(__file__).resolve().parents[1] / "goldens" / "lowering"
PACKING = pack_weights.Packing(64, 32, {DType.F32: 1, DType.BF16: 2})
STEPS = (
    (bind_dims.NAME, "model", partial(bind_dims.run, bounds={"tokens": 32, "rows": 4})),
    (lower_attention.NAME, "model", lower_attention.run),
    (lower_precision.NAME, "model", partial(lower_precision.run, dtype=DType.BF16)),
    (page_state.NAME, "serving", partial(page_state.run, dtype=DType.BF16, block_tokens=16, seqs=4, blocks_per_seq=4)),
    (pack_weights.NAME, "serving", partial(pack_weights.run, packing=PACKING)),
    (group_kernels.NAME, "kernel", group_kernels.run),
)


def lowered() -> Iterator[tuple[str, str, Graph]]:
    """Name, level and graph after each pass, one upon the other."""
    graph, report = tiny_llama(layers=1, hidden=32, heads=2, kv_heads=1, inter=64), Report()
    for name, level, run in STEPS:
        graph = run(graph, report)
        yield name, level, graph


@pytest.mark.parametrize("name", [name for name, _, _ in STEPS])
def test_pass_gives_its_golden(name: str) -> None:
    level, graph = next((level, graph) for n, level, graph in lowered() if n == name)
    verify(graph, level)
    wanted = (FOLDER / f"{name}.txt").read_text(encoding="utf-8")
    assert print_graph(graph) == wanted
    assert same_graph(parse_graph(wanted), graph)


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for pass_name, _, made in lowered():
        (FOLDER / f"{pass_name}.txt").write_text(print_graph(made), encoding="utf-8")
