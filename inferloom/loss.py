"""What an artifact loses against another one: both read the same text, and their predictions are compared.

Logits are the kernels' own, f32; their logarithms of probabilities, and all sums, are taken in f64.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from inferloom.errors import UsageError
from inferloom.runtime.llm import LLM

#: Tokens that are read at most, and in one window.
TOKENS, WINDOW = 4096, 512
_ROWS = 64  # rows of logits that are widened at a time


@dataclass(frozen=True, slots=True)
class Loss:
    """Means over the predictions of a text, in nats per token.

    `nats` and `reference_nats` are the cross entropies of the artifact and of the reference. `kl` is the divergence of the
    artifact's distribution from the reference's, `kl_largest` that of the worst prediction. `agreement`: how often both
    find the same token the likeliest, from 0 to 1.
    """

    text: str
    windows: int
    predictions: int
    nats: float
    reference_nats: float
    kl: float
    kl_largest: float
    agreement: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats)

    @property
    def reference_perplexity(self) -> float:
        return math.exp(self.reference_nats)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"perplexity": self.perplexity, "reference_perplexity": self.reference_perplexity}

    def __str__(self) -> str:
        return (f"perplexity {self.perplexity:.4f}, reference {self.reference_perplexity:.4f}: "
                f"{self.nats - self.reference_nats:+.5f} nats a token, KL {self.kl:.5f} (largest {self.kl_largest:.3f}), "
                f"same likeliest token in {self.agreement:.2%}; {self.predictions} predictions in {self.windows} windows of "
                f"{self.text}")


def report_loss(artifact: Path, reference: Path, text: Path | None = None, tokens: int = TOKENS) -> Loss:
    """Run two artifacts of one model over `tokens` tokens of a text (by default Python source that no file of the demo
    model's training holds) and compare them. UsageError when they have no tokenizer, or the text is too short."""
    with LLM(artifact) as model, LLM(reference) as other:  # both at once, so that a window's logits are all that is kept
        return _compare(model, other, _windows(model, text, tokens), _name(text))


def _name(text: Path | None) -> str:
    return str(text) if text is not None else f"Python {platform.python_version()}'s library, held out from the demo model"


def _texts(text: Path | None) -> list[str]:
    if text is not None:
        try:
            return [text.read_text(encoding="utf-8")]
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{text} cannot be read as a text to measure the loss on: {error}") from None
    from inferloom.models.demo.corpus import load_corpus

    return [file.text for file in load_corpus().held_out]


def _windows(llm: LLM, text: Path | None, tokens: int) -> list[list[int]]:
    """Windows of token ids, from each text in turn, each beginning as the tokenizer begins a text."""
    if llm.tokenizer is None:
        raise UsageError(f"{llm.manifest.model.name} has no tokenizer: its loss on a text cannot be measured")
    start = llm.encode("")
    size = min(WINDOW, llm.engine.longest) - len(start)
    parts = [_cut(llm.encode(one, add_special_tokens=False), size) for one in _texts(text)]
    made, count = [], 0
    for turn in range(max(map(len, parts), default=0)):
        for windows in parts:
            if turn < len(windows) and count < tokens:
                made.append([*start, *windows[turn][: tokens - count]])
                count += len(made[-1]) - len(start)
    made = [ids for ids in made if len(ids) > max(len(start), 1)]
    if not made:
        raise UsageError(f"{_name(text)} holds no tokens to predict")
    return made


def _cut(ids: Sequence[int], size: int) -> list[Sequence[int]]:
    return [ids[i : i + size] for i in range(0, len(ids), size)]


def _compare(model: LLM, other: LLM, windows: Sequence[Sequence[int]], text: str) -> Loss:
    sums, largest, agree, count = np.zeros(3), 0.0, 0, 0
    for ids in windows:
        first = max(1, len(model.encode("")))  # what begins a text is given, not predicted
        next_ids = np.asarray(ids[first:])
        for mine, theirs, wanted in _rows(model.logits(ids)[first - 1 : -1], other.logits(ids)[first - 1 : -1], next_ids):
            p, q = _log_softmax(theirs), _log_softmax(mine)
            at = np.arange(len(wanted)), wanted
            kl = (np.exp(p) * (p - q)).sum(axis=1)
            sums += (-q[at].sum(), -p[at].sum(), kl.sum())
            largest, agree = max(largest, float(kl.max())), agree + int((p.argmax(1) == q.argmax(1)).sum())
            count += len(wanted)
    nats, reference, kl_sum = (float(s) / count for s in sums)
    return Loss(text, len(windows), count, nats, reference, kl_sum, largest, agree / count)


def _rows(mine: np.ndarray, theirs: np.ndarray, ids: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    for i in range(0, len(ids), _ROWS):
        yield mine[i : i + _ROWS], theirs[i : i + _ROWS], ids[i : i + _ROWS]


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
