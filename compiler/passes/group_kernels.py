"""group-kernels: put every node that runs on the device into a `kernel`.

Before: `%y = packed_linear %x, %p; %h = add %r, %y; %n = rms_norm %h, %w; ...`
After:  `%h = kernel %x, %p, %r {kind="matmul", body={...}}; %n = kernel %h, %w {kind="row", body={...}}`

Anchors (a matmul, an attention, a recurrence) get a kernel each, and matmuls and attentions take in the pointwise nodes
that follow them; where the target wants it, a matmul also takes in the gathering of the rows it reads. What is left
works within one row and is joined by depth: the number of anchors on the longest path to a node. Two nodes of equal
depth have no anchor between them, so joining them all can never make a cycle.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from inferloom.compiler.report import Report
from inferloom.ir import op as ops
from inferloom.ir.errors import UnsupportedError
from inferloom.ir.graph import Builder, Graph, Node, Value
from inferloom.ir.ops.recurrent import PAGED, STATE_OF
from inferloom.ir.types import STATES, DType, TensorType

NAME = "group-kernels"
ANCHORS = {"packed_linear": "matmul", "packed_quantized_linear": "matmul", "packed_expert_linear": "experts",
           "packed_quantized_expert_linear": "experts",
           "paged_attention": "attention",
           "block_means": "blocks", "block_scores": "blocks",
           **dict.fromkeys((PAGED + name for name in STATE_OF), "scan")}
_VIEWS = ("reshape", "cast")


@dataclass(slots=True, eq=False)
class _Group:
    kind: str
    depth: int
    nodes: list[Node] = field(default_factory=list)


def run(graph: Graph, report: Report, prologue: bool = False) -> Graph:
    """With `prologue`, a matmul gathers its rows itself."""
    return _Grouping(graph, report, prologue).emit()


class _Grouping:
    def __init__(self, graph: Graph, report: Report, prologue: bool = False) -> None:
        self.graph, self.report, self.prologue = graph, report, prologue
        self.constants = graph.constants()
        self.users = graph.users()
        self.live = [n for n in graph.nodes if not all(v in self.constants for v in n.results)]
        self.place = {node: i for i, node in enumerate(self.live)}
        self.group: dict[Node, _Group] = {}
        self.made_by = graph.producers()
        self.depth: dict[Value, int] = {}
        self.groups: list[_Group] = []
        self._assign()

    # -- which node goes where

    def _assign(self) -> None:
        by_depth: dict[tuple[int, object], _Group] = {}
        before = {n: self._gathered(n) if self.prologue else [] for n in self.live if n.op in ANCHORS}
        waiting = {n for chain in before.values() for n in chain}
        for node in self.live:
            if node in self.group or node in waiting:
                continue
            chain = before.get(node, [])
            depth = max((self.depth.get(v, 0) for n in (*chain, node) for v in n.operands if v is not None), default=0)
            if node.op in ANCHORS:
                group = _Group(ANCHORS[node.op], depth + 1, [*chain, node])
                self.groups.append(group)
                for each in (*chain, node):
                    self._place(each, group)
                for each in chain:
                    self.report.fused(f"{each.op} into the {group.kind} after it", each.loc)
                self._absorb(group, node)
                continue
            key = (depth, self._rows(node))
            if key not in by_depth:
                by_depth[key] = _Group("row", depth)
                self.groups.append(by_depth[key])
            by_depth[key].nodes.append(node)
            self._place(node, by_depth[key])

    def _place(self, node: Node, group: _Group) -> None:
        self.group[node] = group
        for value in node.results:
            self.depth[value] = group.depth

    def _gathered(self, anchor: Node) -> list[Node]:
        """A `gather_rows`, and casts after it, whose rows only this matmul reads."""
        chain: list[Node] = []
        node = self.made_by.get(anchor.operands[0]) if anchor.op == "packed_linear" else None  # type: ignore[arg-type]
        while node is not None and node.op in ("cast", "gather_rows") and len(self.users.get(node.result, ())) == 1:
            chain.insert(0, node)
            if node.op == "gather_rows":
                return chain
            node = self.made_by.get(node.operands[0])  # type: ignore[arg-type]
        return []

    def _rows(self, node: Node) -> object:
        """The symbolic leading dim: tokens and rows never share a kernel."""
        for value in (*node.results, *(v for v in node.operands if v is not None)):
            if isinstance(value.type, TensorType) and value.type.shape and not isinstance(value.type.shape[0], int):
                return value.type.shape[0]
        raise UnsupportedError(f"{node.op} at {node.loc}: no leading token axis; only per-token work can be compiled")

    def _absorb(self, group: _Group, anchor: Node) -> None:
        """Take in what follows the anchor, as long as nothing else has to run first."""
        inside = set(anchor.results[:1])
        if group.kind == "matmul":
            for chain in self._gate_up(anchor):
                self._take(group, chain, inside)
        progress = True
        while progress:
            progress = False
            for value in list(inside):
                for node in self.users.get(value, ()):
                    if node in self.group:
                        continue
                    why = self._why_not(group, anchor, node, inside)
                    if why:
                        continue
                    self._take(group, [node], inside)
                    progress = True
        for value in inside:
            for node in self.users.get(value, ()):
                if node not in self.group and ops.get(node.op).pointwise:
                    self.report.skipped(f"{node.op} into the {group.kind} before it",
                                        self._why_not(group, anchor, node, inside), node.loc)

    def _take(self, group: _Group, nodes: Iterable[Node], inside: set[Value]) -> None:
        for node in nodes:
            group.nodes.append(node)
            self._place(node, group)
            inside.update(node.results)
            self.report.fused(f"{node.op} into the {group.kind} before it", node.loc)

    def _why_not(self, group: _Group, anchor: Node, node: Node, inside: set[Value]) -> str:
        if group.kind in ("scan", "blocks"):
            return f"the {group.kind} kernel stores its result as it is"
        if group.kind != "matmul":
            if node.op not in _VIEWS:
                return f"the {group.kind} kernel's epilogue takes only {' and '.join(_VIEWS)}"
        elif not ops.get(node.op).pointwise:
            return f"{node.op} is not pointwise"
        shapes = {v.type.shape for v in inside if isinstance(v.type, TensorType)}
        if node.op != "reshape" and isinstance(node.result.type, TensorType) and node.result.type.shape not in shapes:
            return "it changes the shape"
        for value in node.operands:
            if value is None or value in inside or value in self.constants:
                continue
            if self.depth.get(value, 0) >= group.depth:
                return "another operand is computed later"
            if value in self.made_by and self.made_by[value] not in self.group:
                return "another operand is computed later"
            if isinstance(value.type, TensorType) and value.type.shape not in shapes:
                return "another operand has a different shape"
        return ""

    def _gate_up(self, anchor: Node) -> list[list[Node]]:
        """`reshape [rows, n/g, 2, g]`, its two halves, each reshaped back: columns of one tile, so they fuse."""
        users = self.users.get(anchor.result, [])
        if len(users) != 1 or users[0].op != "reshape":
            return []
        split = users[0]
        shape = split.result.type.shape if isinstance(split.result.type, TensorType) else ()
        if len(shape) != 4 or shape[2] != 2:
            return []
        chain = [split]
        for half in self.users.get(split.result, []):
            flat = self.users.get(half.result, [])
            if half.op != "slice" or half.attrs["axis"] != 2 or [n.op for n in flat] != ["reshape"]:
                return []
            chain += [half, flat[0]]
        # The halves must both end in nodes of the kernel, else they would have to be stored apart.
        return [chain] if len(chain) == 5 else []

    # -- the new graph

    def emit(self) -> Graph:
        order = self._schedule()
        builder = Builder(self.graph.name, list(self.graph.inputs), list(self.graph.params))
        env: dict[Value, Value] = {v: v for v in (*self.graph.inputs, *(p.value for p in self.graph.params))}
        for node in self.graph.nodes:
            if node not in self.group and node.op != "constant":
                made = builder.copy(node, [None if v is None else self._constant(builder, env, v) for v in node.operands])
                env.update(zip(node.results, made.results, strict=True))
        for group in order:
            body, operands, results = self._body(group)
            locs = dict.fromkeys(n.loc for n in group.nodes if n.loc)
            made = builder.emit_node("kernel", [env[v] for v in operands], {"kind": group.kind, "body": body},
                                     ", ".join(locs), [v.name for v in results])
            env.update(zip(results, made.results, strict=True))
        return builder.finish(env[v] for v in self.graph.outputs)

    def _constant(self, builder: Builder, env: dict[Value, Value], value: Value) -> Value:
        if value not in env:
            node = self.made_by[value]
            env[value] = builder.copy(node, [None if v is None else env[v] for v in node.operands]).result
        return env[value]

    def _schedule(self) -> list[_Group]:
        """Groups in an order in which each follows what it reads."""
        order: list[_Group] = []
        state: dict[_Group, int] = {}

        def add(group: _Group) -> None:
            if state.get(group) == 2:
                return
            if state.get(group) == 1:
                raise UnsupportedError("kernel groups depend on each other in a cycle")
            state[group] = 1
            for node in group.nodes:
                for value in node.operands:
                    maker = self.made_by.get(value) if value is not None else None
                    if maker in self.group and self.group[maker] is not group:
                        add(self.group[maker])
            state[group] = 2
            order.append(group)

        for group in self.groups:
            add(group)
        return order

    def _body(self, group: _Group) -> tuple[Graph, list[Value], list[Value]]:
        """The group's nodes as a graph of their own, with what it reads and what others read of it."""
        nodes = sorted(group.nodes, key=self.place.__getitem__)
        builder = Builder(group.kind)
        env: dict[Value, Value] = {}
        operands: list[Value] = []

        def use(value: Value | None) -> Value | None:
            if value is None or value in env:
                return None if value is None else env[value]
            maker = self.made_by.get(value)
            if maker is not None and maker.op == "constant":
                env[value] = builder.emit_node("constant", (), maker.attrs).result
            else:
                env[value] = builder.input(value.name, value.type)
                operands.append(value)
            return env[value]

        for node in nodes:
            made = builder.copy(node, [use(v) for v in node.operands])
            env.update(zip(node.results, made.results, strict=True))
        wanted = set(self.graph.outputs)
        results = [v for n in nodes for v in n.results
                   if v in wanted or any(self.group.get(u) is not group for u in self.users.get(v, ()))]
        for value in results:
            if not isinstance(value.type, STATES) and value.type.dtype is DType.BOOL:
                raise UnsupportedError(f"a boolean value cannot be stored between kernels ({value!r})")
        return builder.finish(env[v] for v in results), operands, results
