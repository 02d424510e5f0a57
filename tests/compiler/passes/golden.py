"""Goldens of passes: text IR before and after, side by side in one file, and the meaning compared.

`python -m tests.compiler.passes.golden` rewrites the second half of every file; look at the difference.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import numpy as np

from inferloom.compiler.report import Report
from inferloom.ir.graph import Graph
from inferloom.ir.interpret import interpret
from inferloom.ir.text import parse_graph, print_graph
from inferloom.ir.types import DType, TensorType
from inferloom.ir.verify import verify

FOLDER = Path(__file__).resolve().parents[2] / "goldens" / "passes"
DIVIDER = "\n--- after\n"
TOKENS = 5


def names() -> list[str]:
    """Every golden as `pass/case`."""
    return sorted(str(p.relative_to(FOLDER).with_suffix("")) for p in FOLDER.glob("*/*.txt"))


def apply(name: str) -> tuple[Graph, Graph, str, Report]:
    """The graph before, after the pass that the folder names, the text that is expected, and the decisions."""
    text = (FOLDER / f"{name}.txt").read_text(encoding="utf-8")
    before, _, wanted = text.partition(DIVIDER)
    graph, report = parse_graph(before), Report()
    verify(graph, "model")
    run = import_module(f"inferloom.compiler.passes.{Path(name).parent.name.replace('-', '_')}").run
    changed = run(graph, report)
    verify(changed, "model")
    return graph, changed, wanted, report


def random_values(graph: Graph, seed: int = 0) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Inputs by name and parameters by source; positions count up, other integers index small tables."""
    rng = np.random.default_rng(seed)

    def one(type: object, name: str) -> np.ndarray:
        if not isinstance(type, TensorType):
            raise TypeError(type)
        shape = tuple(d if isinstance(d, int) else TOKENS for d in type.shape)
        if type.dtype is DType.I32:
            return np.arange(TOKENS, dtype=np.int32) if name == "positions" else rng.integers(0, 3, shape, np.int32)
        return rng.standard_normal(shape).astype(np.float32)

    return ({v.name: one(v.type, v.name) for v in graph.inputs},
            {p.source: one(p.value.type, p.source) for p in graph.params})


def difference(before: Graph, after: Graph) -> float:
    """The largest difference between what two graphs compute on random values, relative to the size of the values."""
    inputs, params = random_values(before)
    worst = 0.0
    for a, b in zip(interpret(before, inputs, params), interpret(after, inputs, params), strict=True):
        if a.shape != b.shape:
            raise AssertionError(f"shapes {a.shape} and {b.shape}")
        if a.size:
            worst = max(worst, float(np.abs(np.float64(a) - b).max() / max(1e-6, np.abs(a).max())))
    return worst



def update() -> None:
    """Write what the passes make now."""
    for name in names():
        before, changed, wanted, _ = apply(name)
        path = FOLDER / f"{name}.txt"
        head = path.read_text(encoding="utf-8").partition(DIVIDER)[0].rstrip("\n")
        if wanted != print_graph(changed):
            path.write_text(head + DIVIDER + print_graph(changed), encoding="utf-8")
            print(f"changed {path}")


if __name__ == "__main__":
    update()
    sys.exit(0)
