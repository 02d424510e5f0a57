"""transformers' own `generate`, eagerly, with a static batch."""

from __future__ import annotations

from typing import Any

import torch
import transformers


class Engine:
    version = f"transformers {transformers.__version__}, torch {torch.__version__}"

    def __init__(self, model: str, threads: int, options: dict[str, Any]) -> None:
        torch.set_num_threads(threads)
        transformers.logging.set_verbosity_error()
        self._model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()

    def generate(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            made = self._model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new,
                                        do_sample=False, pad_token_id=2)
        return made[:, ids.shape[1]:].tolist()
