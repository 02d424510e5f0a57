"""The interface between the compiler and a target's code generator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from inferloom.ir.errors import UnsupportedError
from inferloom.ir.graph import Graph, Node
from inferloom.ir.types import DType, TensorType
from inferloom.targets.chips import Chip

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Lowering:
    """What a target asks of the passes that come before kernel generation.

    Matmul weights are laid out in tiles of `weight_tile` columns with `weight_pair` k-steps together, k padded to
    `weight_k_multiple` (tile 1 and pair 1: rows of k). Columns of a gate and its up projection alternate in groups of
    `gate_columns`. Matmuls by weights of a type in `inputs` read activations of that one; others, of the weight's own.
    Keys and values can be kept in `kv_dtypes` besides the artifact's own type.
    With `prologue`, matmuls gather their rows themselves. Rows of activations start at multiples of
    `row_align` bytes, and not a multiple of `avoid` bytes apart (0: any).
    `quantized` are the formats of weights, each with one of activations, that there are kernels for (names of
    compiler/quantization/scheme.py).
    """

    dtypes: tuple[str, ...]
    weight_tile: int
    weight_pair: Mapping[DType, int]
    weight_k_multiple: int
    gate_columns: int
    prologue: bool
    row_align: int
    avoid: int
    inputs: Mapping[DType, DType] = field(default_factory=dict)
    quantized: frozenset[tuple[str, str]] = frozenset()
    kv_dtypes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Layout:
    """How one operand or result lies in memory.

    `ld`: elements between rows (0: no rows). `block_stride`: bytes of a block of paged state (0: no state).
    """

    space: str
    ld: int = 0
    block_stride: int = 0


@dataclass(frozen=True, slots=True)
class KernelSource:
    """A `kernel` node to generate: `layouts` are those of its operands, then of its results."""

    symbol: str
    node: Node
    layouts: tuple[Layout, ...]


@dataclass(frozen=True, slots=True)
class Grid:
    """Chunks of work in one call: `ceil(dims[dim] / tile) * mult`; dim -1 means just `mult`.

    dims are tokens (0), seqs (1), rows (2), q_tiles (3) and d_tiles (4).
    """

    dim: int
    tile: int
    mult: int


@dataclass(frozen=True, slots=True)
class Scratch:
    """A kernel's argument that is `offset` bytes into the module's scratch memory."""

    offset: int


#: A kernel's argument that is the step's logits.
OUTPUT = "logits"


@dataclass(frozen=True, slots=True)
class Logits:
    """What a step returns: f32 [rows, vocab], rows `ld` elements apart."""

    rows: int
    vocab: int
    ld: int


@dataclass(frozen=True, slots=True)
class Sums:
    """Where in scratch memory the sums of each row's runs are; see the class of this name in the manifest."""

    offset: int
    count: int
    columns: int


@dataclass(frozen=True, slots=True)
class Top:
    """Where in scratch memory the `count` largest logits of each row are; see the class of this name in the manifest."""

    count: int
    keys: int
    stats: int
    sums: Sums | None = None


@dataclass(frozen=True, slots=True)
class Launch:
    """How a GPU kernel starts; see the class of this name in the manifest."""

    file: str
    threads: int
    shared: int
    least: int
    most: int


def expert_linear_of(source: KernelSource) -> tuple[Graph, Node]:
    """The body of an "experts" kernel, and its linear layer. UnsupportedError when more than views and casts follow it."""
    body = source.node.attrs["body"]
    if not isinstance(body, Graph):
        raise TypeError(body)
    (node,) = (n for n in body.nodes if n.op in ("packed_expert_linear", "packed_quantized_expert_linear"))
    for other in body.nodes:
        if other is not node and other.op not in ("cast", "reshape"):
            raise UnsupportedError(f"{other.loc}: {other.op} cannot follow a linear layer of experts in one kernel")
    return body, node


def expert_counts(source: KernelSource) -> dict[str, int]:
    """How many experts an "experts" kernel has weights of, and how many of them each token chooses."""
    node = expert_linear_of(source)[1]
    quantized = node.op == "packed_quantized_expert_linear"
    weight, choice = (v.type if v is not None else None for v in (node.operands[1], node.operands[4 if quantized else 2]))
    if not isinstance(weight, TensorType) or not isinstance(choice, TensorType):
        raise TypeError(node)
    experts = int(str(weight.shape[0])) * (int(str(weight.shape[2])) if quantized else 1)
    return {"experts": experts // (int(str(node.attrs["n"])) if quantized else 1), "choices": int(str(choice.shape[1]))}


def matmul_of(source: KernelSource) -> Node:
    """The linear layer of a "matmul" kernel."""
    body = source.node.attrs["body"]
    if not isinstance(body, Graph):
        raise TypeError(body)
    (node,) = (n for n in body.nodes if n.op in ("packed_linear", "packed_quantized_linear"))
    return node


def matmul_counts(node: Node, bf16_dot: bool) -> dict[str, int | str]:
    """Columns and inner dimension of a packed linear layer, and the arithmetic of its products: int8, bf16 or fp32.

    `bf16_dot`: whether the chip multiplies bf16; otherwise such products are of fp32.
    """
    x = node.operands[0].type if node.operands[0] is not None else None
    if not isinstance(x, TensorType):
        raise TypeError(node)
    products = "int8" if x.dtype is DType.I8 else "bf16" if bf16_dot and x.dtype is DType.BF16 else "fp32"
    return {"n": int(str(node.attrs["n"])), "k": int(str(node.attrs["k"])), "products": products}


@dataclass(frozen=True, slots=True)
class KernelInfo:
    """A compiled kernel that does (part of) the work of `source`, an index into the sources (-1: after all of them).

    `args` are indices into operands-then-results, names of step inputs, `OUTPUT`, or scratch.
    """

    symbol: str
    kind: str
    source: int
    grid: Grid
    args: tuple[int | str | Scratch, ...]
    launch: Launch | None = None
    resources: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CompiledModule:
    """All kernels of an artifact: `files` by path in the artifact, and what a step calls, in order for each source.

    `scratch`: bytes of memory that kernels share for partial results. `tiles`: tokens of an attention tile for
    prefill, and the most new tokens that a sequence of `d_tiles` has.
    """

    files: Mapping[str, bytes]
    kernels: tuple[KernelInfo, ...]
    tiles: tuple[int, int]
    scratch: int = 0
    top: Top | None = None


class Target(Protocol):
    """A code generator for one chip."""

    @property
    def chip(self) -> Chip: ...

    @property
    def lowering(self) -> Lowering: ...

    @property
    def tools(self) -> tuple[str, ...]:
        """Distributions whose versions decide the artifact's bytes."""
        ...

    def compile_kernels(self, sources: Sequence[KernelSource], logits: Logits | None, say: Progress) -> CompiledModule:
        """Generate and compile all kernels, and those that sampling from `logits` needs.

        UnsupportedError for what the target cannot lower.
        """
        ...

    def numerics(self) -> dict[str, Any]:
        """How sums are ordered and accumulated, for the manifest."""
        ...
