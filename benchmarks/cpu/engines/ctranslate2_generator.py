"""CTranslate2's generator, with a static batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ctranslate2


class Engine:
    version = f"ctranslate2 {ctranslate2.__version__}"

    def __init__(self, model: str, threads: int, options: dict[str, Any]) -> None:
        self._generator = ctranslate2.Generator(model, device="cpu", compute_type=options["compute"], inter_threads=1,
                                                intra_threads=threads)
        self._words = json.loads((Path(model) / "vocabulary.json").read_text())

    def generate(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        made = self._generator.generate_batch([[self._words[t] for t in p] for p in prompts], max_batch_size=0, max_length=new,
                                              min_length=new, sampling_topk=1, beam_size=1, include_prompt_in_result=False)
        return [list(m.sequences_ids[0]) for m in made]
