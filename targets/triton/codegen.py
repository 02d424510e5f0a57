"""The GPU target: kernels become Triton source, the source cubins or code objects, and a launcher goes with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from inferloom.ir.errors import UnsupportedError
from inferloom.ir.graph import Graph
from inferloom.ir.types import DType, TensorType, bound
from inferloom.targets.base import (
    CompiledModule,
    Grid,
    KernelInfo,
    KernelSource,
    Launch,
    Logits,
    Lowering,
    Progress,
    Top,
)
from inferloom.targets.chips import GpuChip
from inferloom.targets.link import link_shared
from inferloom.targets.triton import blocks, configs, experts, rows, sampling, scan
from inferloom.targets.triton.aot import Binary, Compiler, module_text, violations
from inferloom.targets.triton.attention import Attention, heads_of, padded
from inferloom.targets.triton.matmul import Matmul
from inferloom.targets.triton.source import INT32_MAX, KernelText
from inferloom.targets.triton.values import has_rows

LAUNCHER = Path(__file__).with_name("launcher.c")
#: Query rows of a decode tile: the least that the matrix unit takes.
DECODE_ROWS = 16


@dataclass(frozen=True, slots=True)
class Choice:
    """Kernels that come together, in as many configurations as there are: the first that fits the chip is used.

    `options` make kernels and say how many bytes of scratch memory they need; `tiles` goes with prefill attention.
    """

    options: tuple[Callable[[], tuple[list[KernelText], int]], ...]
    tiles: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Picked:
    """Kernels of an artifact, bytes of scratch memory that they share, and tokens of attention tiles."""

    kernels: tuple[KernelText, ...]
    scratch: int
    tiles: tuple[int, int]


class TritonTarget:
    """Code for one GPU.

    `batch_invariant`: one kernel for all numbers of rows, and attention that never splits a sequence, so that a
    sequence's bits do not depend on its batch or on how it was cut into steps; slower.
    """

    tools = ("triton", "ziglang")
    lowering = Lowering(dtypes=("fp32", "fp16", "bf16"), weight_tile=1,
                        weight_pair={DType.F32: 1, DType.F16: 1, DType.BF16: 1}, weight_k_multiple=16, gate_columns=1,
                        prologue=True, row_align=128, avoid=0)

    def __init__(self, chip: GpuChip, batch_invariant: bool = False, workers: int | None = None) -> None:
        self.chip, self.batch_invariant, self.workers = chip, batch_invariant, workers

    def numerics(self) -> dict[str, Any]:
        order = "the same for any batch" if self.batch_invariant else "depends on the number of rows in a step"
        return {"accumulate": "f32", "reduction_order": order, "batch_invariant": self.batch_invariant}

    def compile_kernels(self, sources: Sequence[KernelSource], logits: Logits | None, say: Progress) -> CompiledModule:
        """Generate the kernels, compile them in as many processes as there are cores, and check them."""
        with Compiler(self.chip, self.workers) as compiler:
            chosen, binaries = self.fit(sources, compiler, say, logits)
        suffix = "cubin" if self.chip.driver == "cuda" else "hsaco"
        files = {f"kernels/{k.symbol}.{suffix}": binaries[k.symbol].data for k in chosen.kernels}
        files["kernels/kernels.py"] = module_text(chosen.kernels).encode()
        files["kernels/kernels.so"] = link_shared([], [LAUNCHER], self.chip.triple)
        infos = tuple(info(k, f"kernels/{k.symbol}.{suffix}", binaries[k.symbol]) for k in chosen.kernels)
        top = None if logits is None else Top(sampling.TOP, 0, sampling.kernels(logits)[2])
        return CompiledModule(files, infos, chosen.tiles, chosen.scratch, top)

    def fit(self, sources: Sequence[KernelSource], compiler: Compiler, say: Progress, logits: Logits | None = None,
            ) -> tuple[Picked, dict[str, Binary]]:
        """The kernels in the first configurations that break none of the chip's limits, compiled, by symbol."""
        choices = self.choices(sources, logits)
        levels, binaries = _fit(choices, compiler, say)
        return self.pick(sources, choices, levels), binaries

    def pick(self, sources: Sequence[KernelSource], choices: Sequence[Choice], levels: Sequence[int] = ()) -> Picked:
        """The kernels of the chosen (or the first) configurations, in the order of their sources."""
        levels = levels or [0] * len(choices)
        parts = [c.options[at]() for c, at in zip(choices, levels, strict=True)]
        kernels = sorted((k for texts, _ in parts for k in texts), key=lambda k: (k.source == sampling.AFTER, k.source))
        prefill = next((c.tiles[at] for c, at in zip(choices, levels, strict=True) if c.tiles), 1)
        return Picked(tuple(kernels), max((size for _, size in parts), default=0), (prefill, self.decode_tokens(sources)))

    def decode_tokens(self, sources: Sequence[KernelSource]) -> int:
        """New tokens of a sequence that decode attention takes at most."""
        groups = [heads_of(s).size for s in sources if s.node.attrs["kind"] == "attention"]
        return 0 if self.batch_invariant else max(1, DECODE_ROWS // max(groups, default=1))

    def choices(self, sources: Sequence[KernelSource], logits: Logits | None = None) -> list[Choice]:
        """What there is to choose from, for each kernel or set of kernels. With `logits`, what sampling needs too."""
        made: list[Choice] = []
        attention = [(i, s) for i, s in enumerate(sources) if s.node.attrs["kind"] == "attention"]
        if attention:
            made.append(self._prefill(attention))
        for number, source in enumerate(sources):
            kind = str(source.node.attrs["kind"])
            if kind == "row":
                made.append(Choice((partial(_row, source, number),)))
            elif kind == "matmul":
                made += self._matmul(source, number)
            elif kind == "experts":
                few = 0 if self.batch_invariant else experts.FEW
                made.append(Choice(tuple(partial(_experts, source, number, c, self.chip, few)
                                         for c in configs.experts(experts.dtype_of(source)))))
            elif kind == "blocks":
                made.append(Choice((partial(_blocks, source, number),)))
            elif kind == "scan":
                sizes = (0,) if self.batch_invariant else scan.chunks(source)
                made.append(Choice(tuple(partial(_scan, source, number, c, self.chip.driver) for c in sizes)))
            elif kind == "attention":
                made += self._decode(source, number, self.decode_tokens(sources))
            else:
                raise UnsupportedError(f"the GPU target has no kernels of kind {kind!r}")
        if logits is not None:
            made.append(Choice((partial(_sampling, logits),)))
        return made

    def _matmul(self, source: KernelSource, number: int) -> list[Choice]:
        matmul = Matmul(source, number, self.chip)
        made = []
        ranges = [(0, INT32_MAX)] if self.batch_invariant else [r for r in configs.ROW_RANGES if r[0] <= matmul.max_rows]
        for i, (least, most) in enumerate(ranges):
            found = configs.matmul(self.chip, matmul.dtype, matmul.n, matmul.k, least, 64 if self.batch_invariant else most)
            if self.batch_invariant:
                found = [replace(c, splits=1) for c in found]
            suffix = f"_m{most if most < INT32_MAX else 'n'}"
            reach = INT32_MAX if i == len(ranges) - 1 else most
            made.append(Choice(tuple(partial(_product, matmul, c, least, most, reach, suffix) for c in found)))
        return made

    def _prefill(self, sources: Sequence[tuple[int, KernelSource]]) -> Choice:
        """All prefill kernels together: they share their tiles' number of tokens."""
        kernels = [(Attention(s, i), heads_of(s)) for i, s in sources]
        largest = max(h.size for _, h in kernels)
        each = [a.fitting(configs.prefill(self.chip, a.dtype, h.size, h.units, h.k_dim, h.v_dim)) for a, h in kernels]
        count = max(len(e) for e in each)
        levels = [[e[min(i, len(e) - 1)] for e in each] for i in range(count)]
        tiles = tuple(max(1, min(c.m for c in level) // largest) for level in levels)

        attention = [a for a, _ in kernels]
        return Choice(tuple(partial(_tiles, attention, level, t) for level, t in zip(levels, tiles, strict=True)), tiles)

    def _decode(self, source: KernelSource, number: int, tokens: int) -> list[Choice]:
        if tokens == 0:
            return []
        attention, heads = Attention(source, number), heads_of(source)
        found = configs.decode(self.chip, attention.dtype, tokens, heads.size, heads.units, heads.k_dim, heads.v_dim)
        return [Choice(tuple(partial(_parts, attention, c, tokens) for c in attention.fitting(found)))]


def info(kernel: KernelText, file: str, binary: Binary) -> KernelInfo:
    """What the manifest says of a kernel."""
    return KernelInfo(kernel.symbol, kernel.kind, kernel.source, Grid(*kernel.grid), kernel.args,  # type: ignore[arg-type]
                      Launch(file, binary.threads, binary.shared, kernel.least, kernel.most),
                      {**binary.resources(), **kernel.notes})


def _fit(choices: Sequence[Choice], compiler: Compiler, say: Progress) -> tuple[list[int], dict[str, Binary]]:
    """Compile everything in its first configuration, and what breaks a limit in the next, until all fits."""
    levels, binaries = [0] * len(choices), dict[str, Binary]()
    open_ = list(range(len(choices)))
    while open_:
        texts = [(i, text) for i in open_ for text in choices[i].options[levels[i]]()[0]]
        problems: dict[int, list[str]] = {}
        for (i, text), binary in zip(texts, compiler.compile([text for _, text in texts]), strict=True):
            binaries[text.symbol] = binary
            for problem in violations(binary, text, compiler.chip):
                problems.setdefault(i, []).append(f"kernel {text.symbol} {problem}")
        open_ = list(problems)
        for i in open_:
            levels[i] += 1
            if levels[i] == len(choices[i].options):
                raise UnsupportedError(f"no configuration fits {compiler.chip.name}: {'; '.join(problems[i])}")
            say(f"{'; '.join(problems[i])}: trying smaller tiles")
    return levels, binaries


def _max_rows(source: KernelSource) -> int:
    """The most rows that a step can have, of the kind that the kernel works on."""
    body = source.node.attrs["body"]
    if not isinstance(body, Graph):
        raise TypeError(body)
    for value in (*body.outputs, *body.inputs):
        if has_rows(value) and isinstance(value.type, TensorType):
            return bound(value.type.shape[0])
    raise UnsupportedError(f"{source.node.loc}: a kernel needs a value with rows")


def _row(source: KernelSource, number: int) -> tuple[list[KernelText], int]:
    return [rows.lower(source, number, _max_rows(source))], 0


def _experts(source: KernelSource, number: int, config: configs.ExpertConfig, chip: GpuChip,
             few: int) -> tuple[list[KernelText], int]:
    return experts.lower(source, number, config, chip, few), experts.scratch_bytes(source)


def _blocks(source: KernelSource, number: int) -> tuple[list[KernelText], int]:
    return [blocks.lower(source, number)], 0


def _scan(source: KernelSource, number: int, chunk: int, driver: str) -> tuple[list[KernelText], int]:
    return [scan.lower(source, number, chunk, driver)], 0


def _product(matmul: Matmul, config: configs.MatmulConfig, least: int, most: int, reach: int, suffix: str,
             ) -> tuple[list[KernelText], int]:
    return matmul.lower(config, least, reach, suffix), matmul.scratch_bytes(config, most)


def _sampling(logits: Logits) -> tuple[list[KernelText], int]:
    made, size, _ = sampling.kernels(logits)
    return made, size


def _tiles(kernels: Sequence[Attention], level: Sequence[configs.AttentionConfig], tokens: int,
           ) -> tuple[list[KernelText], int]:
    return [a.prefill(c, tokens) for a, c in zip(kernels, level, strict=True)], 0


def _parts(attention: Attention, config: configs.AttentionConfig, tokens: int) -> tuple[list[KernelText], int]:
    sizes = attention.scratch_sizes(config, max(DECODE_ROWS, config.m))
    return [attention.decode(config, tokens), attention.join(config, tokens)], sum(padded(s) for s in sizes)
