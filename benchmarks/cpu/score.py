"""Whether an engine computes the model: its tokens against the float32 logits of transformers.

With random weights logits are flat, and a token that low precision prefers to the best one is no mistake. So each token
is placed between the best one (0) and what a token picked blindly is on average (1): how far its logit is below the
largest, in units of how far the mean of the logits is.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

#: Mean place of an engine's tokens up to which it counts as computing the model.
SANE = {"bf16": 0.02, "int8": 0.1, "int4": 0.3}
Made = list[tuple[tuple[int, ...], tuple[int, ...]]]


class Reference:
    """The checkpoint in float32. Continuations of one prompt are scored from one pass over it."""

    def __init__(self, checkpoint: Path, threads: int) -> None:
        import torch
        import transformers

        torch.set_num_threads(threads)
        self._model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self._prompts: dict[tuple[int, ...], tuple[Any, Any]] = {}
        self._places: dict[tuple[tuple[int, ...], tuple[int, ...]], list[float]] = {}

    def places(self, prompt: tuple[int, ...], new: tuple[int, ...]) -> list[float]:
        """The place of each new token, given the prompt and the new ones before it."""
        import torch

        if (prompt, new) not in self._places:
            with torch.inference_mode():
                if prompt not in self._prompts:
                    seen = self._model(torch.tensor([prompt]), logits_to_keep=1, use_cache=True)
                    self._prompts[prompt] = seen.logits[0], seen.past_key_values
                logits, cache = self._prompts[prompt]
                if len(new) > 1:
                    later = self._model(torch.tensor([new[:-1]]), past_key_values=copy.deepcopy(cache), use_cache=True)
                    logits = torch.cat([logits, later.logits[0]])
                chosen = logits.gather(1, torch.tensor(new)[:, None])[:, 0]
                best = logits.max(1).values
                self._places[prompt, new] = ((best - chosen) / (best - logits.mean(1))).tolist()
        return self._places[prompt, new]


def score(lines: Iterable[dict[str, Any]], reference: Any) -> dict[str, dict[str, float | bool]]:
    """By the kind of job: mean and largest place of all its tokens, and whether it is sane."""
    places: dict[str, list[float]] = {}
    precision: dict[str, str] = {}
    for line in lines:
        for measured in line.get("lines", ()):
            for prompt, new in measured.get("made", ()):
                places.setdefault(line["kind"], []).extend(reference.places(tuple(prompt), tuple(new)))
                precision[line["kind"]] = line["precision"]
    return {kind: {"mean": sum(found) / len(found), "largest": max(found), "tokens": len(found),
                   "sane": sum(found) / len(found) <= SANE[precision[kind]]} for kind, found in places.items()}
