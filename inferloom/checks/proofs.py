"""What must hold of a compiled attention variant, whichever target runs it.

A run is a step over pieces of sequences, each `(sequence, first token, one past the last)`; what comes back are the
logits of all of its tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from inferloom.compiler.attention import FACTS
from inferloom.ir.expr import Expr
from inferloom.ir.graph import Graph
from inferloom.runtime.facts import Facts

BLOCK, LONGEST = 16, 160
LENGTHS = (100, 37, 71)
#: Tokens of a prompt that sees itself, and those that end a document.
PREFIX, ENDS = 37, frozenset(range(5))
#: Largest error of a logit, relative to the standard deviation of all.
TOLERANCE = 1e-4
Piece = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Result:
    """One line of the report. `ok` is None for what is only told."""

    name: str
    ok: bool | None
    text: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Runner(Protocol):
    """A compiled model with state for a few sequences. `exact`: its bits depend on neither batch nor chunks."""

    exact: bool
    tables: np.ndarray

    def step(self, ids: Sequence[np.ndarray], pieces: Sequence[Piece], tables: np.ndarray) -> np.ndarray: ...

    def poison(self, blocks: Sequence[int]) -> Callable[[], None]:
        """Fill blocks with NaN; what comes back brings the old bytes back."""
        ...


def facts_of(graph: Graph) -> tuple[str, ...]:
    """The facts of tokens that a graph has as inputs."""
    return tuple(fact.name for fact in FACTS if fact.name in {v.name for v in graph.inputs})


def step_arrays(ids: Sequence[np.ndarray], pieces: Sequence[Piece], tables: np.ndarray,
                facts: Sequence[str]) -> dict[str, np.ndarray]:
    """The inputs of a step; `tables` [tables, sequences, columns] are the blocks of each sequence."""
    positions = np.concatenate([np.arange(a, b) for _, a, b in pieces]).astype(np.int32)
    whose = np.concatenate([np.full(b - a, s) for s, a, b in pieces])
    return {
        "tokens": np.concatenate([ids[s][a:b] for s, a, b in pieces]).astype(np.int32), "positions": positions,
        "seq_starts": np.cumsum([0, *(b - a for _, a, b in pieces)]).astype(np.int32),
        "kv_lens": np.array([b for _, _, b in pieces], np.int32),
        "slots": (tables[:, whose, positions // BLOCK] * BLOCK + positions % BLOCK).astype(np.int32),
        "block_tables": np.ascontiguousarray(tables[:, [s for s, _, _ in pieces]], np.int32),
        "facts": np.concatenate([Facts(facts, PREFIX, ENDS).of(ids[s].tolist(), a, b) for s, a, b in pieces], axis=1),
        "logit_rows": np.arange(len(positions), dtype=np.int32)}


def prove(run: Runner, graph: Graph, ids: Sequence[np.ndarray], want: Sequence[np.ndarray]) -> list[Result]:
    """All proofs; `graph` is the model with its attention spelled out, `want` the reference's logits."""
    length = LENGTHS[0]
    whole = run.step(ids, [(0, 0, length)], run.tables)
    error = _error(whole, want[0])
    made = [Result("dense", error <= TOLERANCE, f"error {error:.1e} of a standard deviation against the dense NumPy reference")]

    def same(name: str, got: np.ndarray, expected: np.ndarray, text: str) -> None:
        if run.exact:
            made.append(Result(name, np.array_equal(got, expected), f"{text}: the same bits"
                               if np.array_equal(got, expected) else f"{text}: error {_error(got, expected):.1e}"))
        else:
            made.append(Result(name, _error(got, expected) <= TOLERANCE, f"{text}: error {_error(got, expected):.1e}"))

    def pieces(*sizes: int) -> np.ndarray:
        parts, at = [], 0
        for size in sizes:
            parts.append(run.step(ids, [(0, at, at + size)], run.tables))
            at += size
        return np.concatenate(parts)

    same("chunks", pieces(40, 1, 16, 43), whole, "a prompt in chunks of 40, 1, 16 and 43 against the whole")
    same("decode", pieces(90, *[1] * (length - 90)), whole, "the last ten tokens one by one against the whole")
    # Another sequence with the same start takes over the first blocks, and computes the rest.
    run.step(ids, [(0, 0, length)], run.tables)
    shared, kept = run.tables.copy(), 2 * BLOCK
    shared[:, 1, :kept // BLOCK] = shared[:, 0, :kept // BLOCK]
    same("cached", run.step([ids[0], ids[0]], [(1, kept, length)], shared), whole[kept:],
         f"with the state of the first {kept} tokens taken over against fresh")
    alone = [run.step(ids, [(s, 0, n)], run.tables) for s, n in enumerate(LENGTHS)]
    together = run.step(ids, [(s, 0, n) for s, n in enumerate(LENGTHS)], run.tables)
    same("batch", together, np.concatenate(alone), "three sequences of 100, 37 and 71 tokens in one step against alone")
    made.append(_pages(run, graph, ids))
    return made


def _error(got: np.ndarray, want: np.ndarray) -> float:
    worst = np.abs(got - want).max() / want.std()
    return float(worst) if np.isfinite(worst) else float("inf")


def _pages(run: Runner, graph: Graph, ids: Sequence[np.ndarray]) -> Result:
    """Which pages the last query reads: those in which NaN reaches its logits."""
    last = LENGTHS[0] - 1
    run.step(ids, [(0, 0, last)], run.tables)
    clean = run.step(ids, [(0, last, last + 1)], run.tables)
    read = []
    for page in range(last // BLOCK + 1):
        restore = run.poison([int(b) for b in run.tables[:, 0, page]])
        if not np.array_equal(run.step(ids, [(0, last, last + 1)], run.tables), clean):
            read.append(page)
        restore()
    if any(n.attrs.get("blocks") for n in graph.nodes):
        return Result("pages", None, f"the query at {last} chooses its pages: which those are depends on what is in all of them")
    seen = sorted({int(k) // BLOCK for k in np.flatnonzero(visible_keys(graph, ids[0], last))})
    text = f"the query at {last} reads {len(read)} of {last // BLOCK + 1} pages; {len(seen)} hold keys that it sees"
    missed = sorted(set(seen) - set(read))
    return Result("pages", not missed, text + (f", of which it misses {missed}" if missed else ""))


def visible_keys(graph: Graph, ids: np.ndarray, query: int) -> np.ndarray:
    """Which keys 0..query the query of these tokens sees in some layer, by some head."""
    names = facts_of(graph)
    facts = dict(zip(names, Facts(names, PREFIX, ENDS).of(ids.tolist(), 0, query + 1), strict=True))
    keys, seen = np.arange(query + 1), np.zeros(query + 1, bool)
    for node in graph.nodes:
        visible = node.attrs.get("visible")
        if node.op != "flex_attention" or not isinstance(visible, Expr) or node.operands[0] is None:
            continue
        heads = np.arange(int(str(node.operands[0].type.shape[1])))  # type: ignore[union-attr]
        env = {"q_pos": query, "k_pos": keys[None, :], "head": heads[:, None], "score": np.zeros((1, 1)), "token": query}
        env |= {f"t{i}": facts[v.name] for i, v in enumerate(node.operands[3:]) if v is not None and v.name in facts}
        try:
            made = visible.evaluate(env)
        except KeyError:  # it looks into tables, whose numbers are not at hand here
            return np.ones(query + 1, bool)
        seen |= np.broadcast_to(made, (len(heads), query + 1)).any(0)
    return seen
