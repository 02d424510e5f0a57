"""OpenVINO GenAI: its pipeline for one stream (`mode` sdpa), or the one with continuous batching (`mode` cb)."""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai


class Engine:
    version = f"openvino-genai {genai.__version__}"

    def __init__(self, model: str, threads: int, options: dict[str, Any]) -> None:
        settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        self._batching = options["mode"] == "cb"
        if self._batching:
            scheduler = genai.SchedulerConfig()
            scheduler.cache_size, scheduler.max_num_seqs, scheduler.max_num_batched_tokens = 2, 32, 2048  # GB first
            scheduler.enable_prefix_caching = False
            self._pipeline = genai.ContinuousBatchingPipeline(model, scheduler, "CPU", settings)
        else:
            self._pipeline = genai.LLMPipeline(model, "CPU", settings | {"ATTENTION_BACKEND": "SDPA"})

    def generate(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        how = genai.GenerationConfig()
        how.max_new_tokens, how.ignore_eos, how.do_sample = new, True, False
        if self._batching:
            asked = [ov.Tensor(np.array([p], np.int64)) for p in prompts]
            return [list(r.m_generation_ids[0]) for r in self._pipeline.generate(asked, [how] * len(prompts))]
        ids = np.array(prompts, np.int64)
        return [list(t) for t in self._pipeline.generate(
            genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids))), how).tokens]
