"""vLLM's build for CPUs, its engine in this process."""

from __future__ import annotations

from typing import Any

import vllm


class Engine:
    version = f"vllm {vllm.__version__}"

    def __init__(self, model: str, threads: int, options: dict[str, Any]) -> None:
        self._llm = vllm.LLM(model, dtype="bfloat16", max_model_len=1024, max_num_seqs=32, max_num_batched_tokens=2048,
                             enable_prefix_caching=False, disable_log_stats=True, skip_tokenizer_init=True)

    def generate(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        how = vllm.SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        made = self._llm.generate([{"prompt_token_ids": p} for p in prompts], how, use_tqdm=False)
        return [list(m.outputs[0].token_ids) for m in made]
