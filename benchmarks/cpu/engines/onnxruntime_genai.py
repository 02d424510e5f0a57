"""onnxruntime-genai, with a static batch."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnxruntime_genai as genai


class Engine:
    version = f"onnxruntime-genai {genai.__version__}"

    def __init__(self, model: str, threads: int, options: dict[str, Any]) -> None:
        config = genai.Config(model)
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {
            "intra_op_num_threads": threads, "inter_op_num_threads": 1}}}}))
        self._model = genai.Model(config)

    def generate(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        length = len(prompts[0]) + new
        parameters = genai.GeneratorParams(self._model)
        parameters.set_search_options(do_sample=False, max_length=length, min_length=length, batch_size=len(prompts),
                                      past_present_share_buffer=True)
        generator = genai.Generator(self._model, parameters)
        generator.append_tokens(np.array(prompts, np.int32))
        made: list[list[int]] = [[] for _ in prompts]
        for _ in range(new):
            generator.generate_next_token()
            for ids, token in zip(made, generator.get_next_tokens()):
                ids.append(int(token))
        return made
