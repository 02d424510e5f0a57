"""Models, shapes and candidate configurations of the GPU benchmark, as data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from inferloom.ir.types import DType
from inferloom.targets.chips import GpuChip
from inferloom.targets.triton import configs
from inferloom.targets.triton.configs import AttentionConfig, MatmulConfig

MAX_TOKENS, MAX_SEQS, MAX_LEN, BLOCK = 2048, 128, 8192, 32
#: Rows of the matmuls that are measured; logits are wanted for few rows only.
ROWS = (1, 4, 16, 64, 256, 2048, 8192)
HEAD_ROWS, HEAD_WIDTH = 64, 100_000
#: Longest context of the attention kernels, in tokens.
CONTEXT = 32768


@dataclass(frozen=True, slots=True)
class Model:
    """A configuration of transformers by its class and arguments."""

    name: str
    kind: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Linear:
    """Weights [n, k]."""

    n: int
    k: int

    def rows(self) -> tuple[int, ...]:
        return tuple(m for m in ROWS if m <= HEAD_ROWS or self.n < HEAD_WIDTH)


@dataclass(frozen=True, slots=True)
class Heads:
    """Query heads, key-value heads and their size."""

    q: int
    kv: int
    dim: int


@dataclass(frozen=True, slots=True)
class Job:
    """What to build; `variants` 0 keeps the configuration that the compiler would choose, and no other."""

    models: tuple[Model, ...]
    linears: tuple[Linear, ...]
    heads: tuple[Heads, ...]
    variants: int = 99
    limits: dict[str, int] = field(default_factory=lambda: {
        "max_tokens": MAX_TOKENS, "max_seqs": MAX_SEQS, "max_model_len": MAX_LEN, "block_tokens": BLOCK})


def _llama(name: str, hidden: int, inner: int, layers: int, dim: int, factor: float, tied: bool) -> Model:
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": factor, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return Model(name, "LlamaConfig", {
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": dim, "vocab_size": 128256, "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": tied, "rope_parameters": rope})


LLAMA_1B = _llama("llama-3.2-1b", 2048, 8192, 16, 64, 32.0, True)
LLAMA_8B = _llama("llama-3.1-8b", 4096, 14336, 32, 128, 8.0, False)
QWEN_8B = Model("qwen3-8b", "Qwen3Config", {
    "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}})
#: In the order in which a run that is short of time does them.
FULL = Job(
    models=(LLAMA_1B, LLAMA_8B, QWEN_8B),
    linears=tuple(Linear(n, k) for n, k in (
        (6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096),  # Llama-3.1-8B
        (24576, 4096), (4096, 12288), (151936, 4096),  # what Qwen3-8B has besides
        (3072, 2048), (2048, 2048), (16384, 2048), (2048, 8192), (128256, 2048))),  # Llama-3.2-1B
    heads=(Heads(32, 8, 128), Heads(32, 8, 64), Heads(64, 8, 128), Heads(28, 4, 128)))

#: Sequences x tokens of context for decode; (new tokens, context before them) for prefill.
DECODE = tuple((b, n) for n in (512, 2048, 8192, 32768) for b in (1, 8, 32, 128))
PREFILL = ((512, 0), (2048, 0), (8192, 0), (16384, 0), (2048, 8192))

# What to change in the compiler's choice, by the upper end of the range of rows (the last range has no end).
_FEW: tuple[dict[str, Any], ...] = (
    {"n": 16}, {"n": 32}, {"n": 64}, {"n": 128}, {"splits": 2}, {"splits": 4}, {"k": 64}, {"k": 256, "stages": 3},
    {"warps": 8}, {"stages": 3}, {"n": 32, "splits": 2}, {"n": 64, "splits": 4}, {"n": 32, "k": 256, "stages": 3})
_SOME: tuple[dict[str, Any], ...] = (
    {"n": 64}, {"n": 128}, {"k": 128, "stages": 4}, {"m": 128}, {"m": 128, "n": 128, "warps": 8}, {"n": 256, "warps": 8},
    {"splits": 2}, {"n": 128, "splits": 2, "stages": 5}, {"n": 128, "splits": 4}, {"stages": 6})
_MANY: tuple[dict[str, Any], ...] = (
    {"n": 256}, {"n": 128}, {"n": 128, "stages": 4}, {"n": 256, "persistent": 0}, {"n": 256, "persistent": 0, "stages": 4},
    {"n": 128, "persistent": 0, "stages": 4}, {"m": 256, "n": 128}, {"n": 256, "group": 16}, {"n": 128, "group": 16, "stages": 5},
    {"m": 64, "n": 256, "warps": 4})
CHANGES = {16: _FEW, 64: (*_FEW[1:7], {"k": 128, "stages": 4}, {"warps": 8}, {"n": 64, "stages": 7}, {"n": 128, "splits": 4}),
           256: _SOME}


def matmuls(chip: GpuChip, shape: Linear, variants: int) -> Iterator[tuple[int, int, MatmulConfig]]:
    """(least, most rows, configuration): the compiler's choice first, then what is worth trying."""
    for least, most in configs.ROW_RANGES:
        if least > max(shape.rows()):
            continue
        first = configs.matmul(chip, DType.BF16, shape.n, shape.k, least, most)[0]
        changed = (replace(first, **{"most_rows": most if most < 2**31 - 1 else first.most_rows, **change})
                   for change in CHANGES.get(most, _MANY)[:variants])
        # What splits k cannot run persistently, and a split needs some depth.
        fits = (c for c in changed if c.shared(2) <= chip.shared and shape.k >= c.splits * 4 * c.k)
        yield from ((least, most, c) for c in dict.fromkeys((first, *fits)))


def decodes(chip: GpuChip, heads: Heads, tokens: int, variants: int) -> list[AttentionConfig]:
    first = configs.decode(chip, DType.BF16, tokens, heads.q // heads.kv, heads.kv, heads.dim, heads.dim)[0]
    changes: tuple[dict[str, Any], ...] = ({"n": 128}, {"warps": 8}, {"stages": 2}, {"stages": 4}, {"splits": first.splits // 2},
                                           {"n": 128, "warps": 8, "stages": 2}, {"n": 32, "stages": 4})
    return list(dict.fromkeys((first, *(replace(first, **c) for c in changes[:variants]))))


def prefills(chip: GpuChip, heads: Heads, variants: int) -> list[AttentionConfig]:
    first = configs.prefill(chip, DType.BF16, heads.q // heads.kv, heads.kv, heads.dim, heads.dim)[0]
    changes: tuple[dict[str, Any], ...] = ({"n": 128}, {"n": 128, "stages": 2}, {"stages": 2}, {"stages": 4}, {"warps": 4},
                                           {"m": 64, "warps": 4}, {"m": 64, "warps": 4, "n": 128, "stages": 2})
    return list(dict.fromkeys((first, *(replace(first, **c) for c in changes[:variants]))))
