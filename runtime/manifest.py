"""`manifest.json`: the whole description of an artifact, as frozen classes that reader and writer share.

The schema is the dataclasses below; reading is strict. Unknown keys, missing keys and wrong types are errors that
name the key's path, such as `manifest.plan[3].args[0].offset`. `versions` and `numerics` are free-form records.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, get_args

from inferloom.runtime.errors import ArtifactError
from inferloom.runtime.records import read, write

SCHEMA = 3
ABI = 2
ALIGN = 64
"""Alignment in bytes of every buffer, tensor and data section."""
MAX_ARGS = 24
"""Pointers that a kernel takes (16 on a CPU)."""
DIMS = ("tokens", "seqs", "rows", "q_tiles", "d_tiles")
"""The counts of one step, by their number in `Grid.dim`."""
KEY_TILE = 16
"""Tokens that lie together in a block of state."""
SEAL, MANIFEST = "SEAL", "manifest.json"
KERNELS_FILE = "kernels/kernels.so"
WASM_FILE = "kernels/kernels.wasm"
FOREIGN = ("wasm", "opencl", "webgpu")
"""Drivers that this runtime has no device for: other programs run their kernels."""

Space = Literal["workspace", "weights", "state", "input"]
Driver = Literal["none", "cuda", "hip", "wasm", "opencl", "webgpu"]
#: What becomes one vector of a prompt's hidden states: that of the last token, or the mean of all.
Pooling = Literal["last", "mean"]
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)


@dataclass(frozen=True, slots=True)
class ModelInfo:
    name: str
    architecture: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    dtype: Literal["fp32", "fp16", "bf16"]


@dataclass(frozen=True, slots=True)
class Chip:
    """What the kernels were compiled for.

    `triple` and `features` (CPU flags as /proc/cpuinfo names them) are those of the process that loads
    kernels.so. A GPU is reached through `driver`; its code is for `arch`, such as "sm_90" or "gfx942". `driver` is also what
    runs the kernels of `FOREIGN`.
    """

    name: str
    triple: str
    features: tuple[str, ...]
    driver: Driver
    arch: str


@dataclass(frozen=True, slots=True)
class Dims:
    """Upper bounds of one step; `facts` of each token that it tells besides its position (runtime/facts.py)."""

    tokens: int
    seqs: int
    rows: int
    blocks_per_seq: int
    facts: tuple[Literal["prefix_len", "document_start"], ...] = ()


@dataclass(frozen=True, slots=True)
class Tiles:
    """How attention work is cut: sequences with at most `decode` new tokens are one entry of `d_tiles` each,
    the others have their tokens in `q_tiles` of `prefill`."""

    prefill: int
    decode: int


@dataclass(frozen=True, slots=True)
class StateLayer:
    """A layer's `bytes` at `offset` of each block of the group's table number `table`.

    `shape` is (heads, k_dim, v_dim) of each token's key and value (v_dim 0: the value is part of the key), (heads, k_dim)
    of the means of a block's keys, or that of a recurrent state.
    """

    table: int
    offset: int
    bytes: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StateGroup:
    """Layers whose state lives and dies alike, in `tables` tables of blocks.

    "paged_kv" keeps all keys, "window_kv" those of the last `window` tokens: each of its tables has a block for every
    `block_tokens` tokens. "recurrent" is of fixed size: each of its tables has one block for a whole sequence.
    """

    kind: Literal["paged_kv", "window_kv", "recurrent"]
    window: int
    tables: int
    layers: tuple[StateLayer, ...]


@dataclass(frozen=True, slots=True)
class State:
    """All state: blocks of one size, each of which serves any table of any group."""

    block_tokens: int
    bytes_per_block: int
    groups: tuple[StateGroup, ...]

    @property
    def kv_tables(self) -> int:
        return sum(g.tables for g in self.groups if g.kind != "recurrent")

    @property
    def recurrent_tables(self) -> int:
        return sum(g.tables for g in self.groups if g.kind == "recurrent")


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that one device needs: fixed parts, and each block of state."""

    weights: int
    workspace: int
    inputs: int
    bytes_per_block: int


@dataclass(frozen=True, slots=True)
class Sums:
    """f32 [rows, count] at a byte offset in the workspace: of each run of `columns` logits, the sum of exp((logit - the
    row's largest) * sharpness).
    """

    offset: int
    count: int
    columns: int


@dataclass(frozen=True, slots=True)
class Top:
    """Where a device leaves each row's `count` largest logits, as byte offsets in the workspace.

    `keys`: i64 [rows, count], largest first. A key's upper half is the logit's bits, those of a negative one but
    the sign flipped, so that keys sort as logits; the lower half is 2**31 - 1 less the token's id. `stats`: f32
    [rows, 2], the row's largest logit times its `sharpness`, and the sum of exp(logit * sharpness - that), which is NaN
    if a logit is NaN or infinity. `sums`, where there are any, are those of parts of a row.
    """

    count: int
    keys: int
    stats: int
    sums: Sums | None = None


@dataclass(frozen=True, slots=True)
class Output:
    """Where the f32 logits [rows, vocab] lie: byte offset in the workspace, row stride `ld` in elements.

    Of an artifact that embeds they are hidden states, `vocab` is their size, and there is no `top`.
    """

    name: str
    offset: int
    ld: int
    vocab: int
    top: Top | None


@dataclass(frozen=True, slots=True)
class Grid:
    """chunks = ceil(dims[dim] / tile) * mult, dims as in `DIMS`; dim -1 means `mult` chunks."""

    dim: int
    tile: int
    mult: int


@dataclass(frozen=True, slots=True)
class Launch:
    """How a GPU kernel starts: its code, threads of a block, bytes of dynamic shared memory.

    It is skipped unless least <= dims[grid.dim] <= most.
    """

    file: str
    threads: int
    shared: int
    least: int
    most: int


@dataclass(frozen=True, slots=True)
class Kernel:
    """`launch` is None on a CPU. `resources` is a record for people: registers, spills and the like."""

    symbol: str
    kind: str
    source: tuple[str, ...]
    grid: Grid
    launch: Launch | None
    resources: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Arg:
    """A byte offset into a space, or the name of a step input."""

    space: Space
    offset: int | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Call:
    kernel: int
    args: tuple[Arg, ...]


@dataclass(frozen=True, slots=True)
class WeightsInfo:
    """`data_offset`: bytes before the data section; `bytes`: length of the data section."""

    file: str
    data_offset: int
    bytes: int


@dataclass(frozen=True, slots=True)
class FileInfo:
    bytes: int
    blake3: str


@dataclass(frozen=True, slots=True)
class Embedding:
    """How an artifact that embeds makes one vector of a prompt's hidden states, unless a request says otherwise: of the last
    token or the mean of all; of length 1 if `normalize`."""

    pooling: Pooling = "last"
    normalize: bool = True


@dataclass(frozen=True, slots=True)
class Manifest:
    """The manifest of one artifact. `files` is empty until the artifact is sealed. What its `task` is, a step gives:
    logits to generate from, or the final hidden states to embed with, as `embedding` says."""

    schema: int
    abi: int
    versions: dict[str, Any]
    model: ModelInfo
    chip: Chip
    dims: Dims
    tiles: Tiles
    state: State
    memory: Memory
    output: Output
    kernels: tuple[Kernel, ...]
    plan: tuple[Call, ...]
    weights: WeightsInfo
    numerics: dict[str, Any]
    files: dict[str, FileInfo]
    task: Literal["generate", "embed"] = "generate"
    embedding: Embedding = Embedding()

    @staticmethod
    def from_json(data: object) -> Manifest:
        """Read a parsed JSON value. Raises ArtifactError naming the key path of whatever is not as it must be."""
        # Versions first: a newer schema must be refused as such, not for one of its new keys.
        if isinstance(data, dict):
            for key, ours in (("schema", SCHEMA), ("abi", ABI)):
                if type(data.get(key)) is int and data[key] != ours:
                    raise ArtifactError(f"manifest.{key} is {data[key]}, but this runtime reads {key} {ours}: "
                                        "compile the model again, or install the matching runtime")
        manifest = read(Manifest, data, "manifest")
        for problem in _problems(manifest):
            raise ArtifactError(f"manifest.{problem}")
        return manifest

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists and scalars; `from_json` of it gives an equal manifest."""
        return write(self)


def kernels_files(m: Manifest) -> set[str]:
    """The files of an artifact that hold code."""
    library = {"wasm": WASM_FILE, "opencl": None, "webgpu": None}.get(m.chip.driver, KERNELS_FILE)
    launched = {k.launch.file for k in m.kernels if k.launch is not None}
    return launched | ({library} if library else set())


def dumps(manifest: Manifest) -> bytes:
    """The canonical bytes: sorted keys, indent 1, trailing newline, ASCII."""
    text = json.dumps(manifest.to_json(), sort_keys=True, indent=1, allow_nan=False)
    return (text + "\n").encode("ascii")


def loads(data: bytes) -> Manifest:
    """Parse canonical bytes. Raises ArtifactError when they are not JSON, not canonical or not a manifest."""
    try:
        parsed = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"manifest.json is not JSON: {error}") from None
    manifest = Manifest.from_json(parsed)
    if dumps(manifest) != data:
        raise ArtifactError("manifest.json is not in canonical form (sorted keys, indent 1, trailing newline, "
                            "no repeated keys); write it with inferloom")
    return manifest


def inputs_layout(dims: Dims, tiles: Tiles, state: State) -> tuple[dict[str, tuple[int, tuple[int, ...]]], int]:
    """Where each int32 step input lies: {name: (byte offset, shape at its largest)} and the bytes of all.

    `sharpness` is float32: 1 / temperature of each row of logits.
    `dims` holds the counts of `DIMS`. q_tiles and d_tiles hold one (sequence, first token, count) per attention
    tile; each sequence adds at most one tile that is not full. There are slots and block_tables for each table of keys
    and values (slots, slots1, ...), pages (the block to read, the block to write) for each recurrent one, and the facts
    that `dims` name.
    block_tables come last, for they may be long.
    """
    tokens, seqs, rows = dims.tokens, dims.seqs, dims.rows
    shapes: dict[str, tuple[int, ...]] = {
        "dims": (8,), "tokens": (tokens,), "positions": (tokens,), "seq_starts": (seqs + 1,), "kv_lens": (seqs,),
        **{f"slots{i or ''}": (tokens,) for i in range(state.kv_tables)},
        **{f"pages{i or ''}": (seqs, 2) for i in range(state.recurrent_tables)},
        **{name: (tokens,) for name in dims.facts},
        "logit_rows": (rows,), "sharpness": (rows,), "q_tiles": (tokens // tiles.prefill + seqs, 3), "d_tiles": (seqs, 3),
        **{f"block_tables{i or ''}": (seqs, dims.blocks_per_seq) for i in range(state.kv_tables)},
    }
    layout, offset = {}, 0
    for name, shape in shapes.items():
        layout[name] = (offset, shape)
        offset += -(-prod(shape) * 4 // ALIGN) * ALIGN
    return layout, offset


def _problems(m: Manifest) -> Iterator[str]:
    """What types cannot say: every number that becomes an address or a size is in range."""
    for name in ("tokens", "seqs", "rows", "blocks_per_seq"):
        if not 1 <= getattr(m.dims, name) < 2**31:
            yield f"dims.{name} must be between 1 and 2**31-1, got {getattr(m.dims, name)}"
    if m.dims.seqs * m.dims.blocks_per_seq >= 2**31:
        yield "dims.seqs * dims.blocks_per_seq must be below 2**31"
    if m.model.vocab_size < 1 or m.model.max_model_len < 1:
        yield "model.vocab_size and model.max_model_len must be positive"
    if m.tiles.prefill < 1 or m.tiles.decode < 0:
        yield f"tiles must have prefill >= 1 and decode >= 0, got {m.tiles}"
        return
    if m.state.block_tokens < KEY_TILE or m.state.block_tokens % KEY_TILE:
        yield f"state.block_tokens must be a positive multiple of {KEY_TILE}, got {m.state.block_tokens}"
    if m.state.bytes_per_block < 1 or m.state.bytes_per_block != m.memory.bytes_per_block:
        yield "state.bytes_per_block must be positive and equal memory.bytes_per_block"
    for name in ("weights", "workspace", "inputs"):
        if getattr(m.memory, name) < 0:
            yield f"memory.{name} must not be negative, got {getattr(m.memory, name)}"
    if m.weights.data_offset % ALIGN or m.weights.data_offset < ALIGN:
        yield f"weights.data_offset must be a positive multiple of {ALIGN}, got {m.weights.data_offset}"
    if m.weights.bytes < 0:
        yield "weights.bytes must not be negative"
    yield from _state_problems(m.state)
    layout, needed = inputs_layout(m.dims, m.tiles, m.state)
    if m.memory.inputs < needed:
        yield f"memory.inputs is {m.memory.inputs}, but the step inputs of these dims take {needed} bytes"
    out = m.output
    if out.vocab < 1 or out.ld < out.vocab or out.offset < 0 or out.offset % 4:
        yield "output must have 1 <= vocab <= ld and an offset that is a multiple of 4"
    if out.offset + m.dims.rows * out.ld * 4 > m.memory.workspace:
        yield f"output: {m.dims.rows} rows of {out.ld} floats at {out.offset} leave memory.workspace"
    if out.top is not None and m.task != "generate":
        yield f"output.top goes with the task generate, not {m.task}"
    if m.embedding != Embedding() and m.task != "embed":
        yield f"embedding goes with the task embed, not {m.task}"
    if out.top is not None:
        places = ((out.top.keys, out.top.count * 8), (out.top.stats, 8))
        if not (out.top.count >= 1 and out.top.keys + m.dims.rows * out.top.count * 8 <= out.top.stats):
            yield f"output.top must have keys before stats: {out.top}"
        if any(at < 0 or at % 8 or at + m.dims.rows * size > m.memory.workspace for at, size in places):
            yield f"output.top leaves memory.workspace: {out.top}"
        sums = out.top.sums
        if sums is not None and not (sums.columns >= 1 and sums.count * sums.columns >= out.vocab and sums.offset >= 0
                                     and sums.offset % 4 == 0
                                     and sums.offset + m.dims.rows * sums.count * 4 <= m.memory.workspace):
            yield f"output.top.sums must cover the vocabulary, within memory.workspace: {sums}"
    for i, kernel in enumerate(m.kernels):
        if not -1 <= kernel.grid.dim < len(DIMS) or kernel.grid.tile < 1 or kernel.grid.mult < 0:
            yield f"kernels[{i}].grid must have dim in -1..{len(DIMS) - 1}, tile >= 1 and mult >= 0, got {kernel.grid}"
        if max(kernel.grid.tile, kernel.grid.mult) >= 2**31:
            yield f"kernels[{i}].grid does not fit 32 bits"
        launch = kernel.launch
        if (launch is None) != (m.chip.driver in ("none", "wasm")):
            yield f"kernels[{i}].launch belongs to kernels of a GPU, and to all of them"
        elif launch is not None and not (1 <= launch.threads <= 1024 and 0 <= launch.shared < 2**20
                                         and 0 <= launch.least <= launch.most < 2**31):
            yield f"kernels[{i}].launch has numbers out of range: {launch}"
    sizes = {"workspace": m.memory.workspace, "weights": m.weights.bytes, "state": m.state.bytes_per_block,
             "input": m.memory.inputs}
    for i, call in enumerate(m.plan):
        if not 0 <= call.kernel < len(m.kernels):
            yield f"plan[{i}].kernel is {call.kernel}, but there are {len(m.kernels)} kernels"
        if len(call.args) > MAX_ARGS:
            yield f"plan[{i}].args has {len(call.args)} entries, a kernel takes at most {MAX_ARGS}"
        for j, arg in enumerate(call.args):
            where = f"plan[{i}].args[{j}]"
            if (arg.offset is None) == (arg.name is None):
                yield f"{where} must have either an offset or a name"
            elif arg.name is not None and arg.name not in layout:
                yield f"{where}.name {arg.name!r} is no step input; there are: {', '.join(layout)}"
            elif arg.name is not None and arg.space != "input":
                yield f"{where}.name goes only with space 'input', got {arg.space!r}"
            elif arg.offset is not None and not 0 <= arg.offset <= sizes[arg.space]:
                yield f"{where}.offset {arg.offset} is outside the {sizes[arg.space]} bytes of {arg.space}"


def _state_problems(state: State) -> Iterator[str]:
    for i, group in enumerate(state.groups):
        if group.tables < 1 or (group.kind == "window_kv") != (group.window > 0) or group.window < 0:
            yield f"state.groups[{i}] must have tables >= 1, and a window > 0 if it is window_kv, else 0"
        for j, layer in enumerate(group.layers):
            if not 0 <= layer.table < group.tables or layer.offset < 0 or layer.bytes < 1:
                yield f"state.groups[{i}].layers[{j}] is in table {layer.table} of {group.tables}, at {layer.offset}"
            if layer.offset + layer.bytes > state.bytes_per_block:
                yield f"state.groups[{i}].layers[{j}] leaves its block of {state.bytes_per_block} bytes"
