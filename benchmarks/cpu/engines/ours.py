"""This project's engine, on an artifact."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from inferloom import __version__
from inferloom.runtime.device.base import StepBatch
from inferloom.runtime.llm import LLM
from inferloom.runtime.params import SamplingParams

#: Blocks that a real prompt fills, before they are copied.
SEED_BLOCKS = 8
FIRST_TOKEN = 1000


class Engine:
    version = __version__

    def __init__(self, model: str, threads: int, options: dict[str, Any]) -> None:
        self.llm = LLM(model, threads=threads, enable_prefix_caching=False, **options)
        memory = self.llm.manifest.memory
        self.contract = {"weights": memory.weights, "workspace": memory.workspace, "inputs": memory.inputs}

    def generate(self, prompts: list[list[int]], new: int) -> list[tuple[int, ...]]:
        made = self.llm.generate(prompts, _greedy(new))
        return [tuple(m.outputs[0].token_ids) for m in made]

    def decode_at(self, context: int, batch: int, steps: int) -> float:
        """Tokens a second of sequences that already have `context` tokens, over steps of the device alone.

        Keys and values are those of a short prompt, copied into blocks of each sequence's own: what is read is real, and
        nobody waits for prompts of that length. RuntimeError for a model that keeps more than keys and values.
        """
        device, state = self.llm.device, self.llm.manifest.state
        size = state.block_tokens
        each = -(-(context + steps) // size)
        if [g.kind for g in state.groups] != ["paged_kv"] or batch * each > device.num_blocks:
            raise RuntimeError(f"{batch} sequences of {context} tokens need one group of keys and values, {batch * each} blocks")
        positions = np.arange(SEED_BLOCKS * size, dtype=np.int32)
        device.step(_step(FIRST_TOKEN + positions, positions, np.arange(SEED_BLOCKS, dtype=np.int32)[None], size))
        device.copy_blocks([(block % SEED_BLOCKS, block) for block in range(SEED_BLOCKS, batch * each)])
        tables = np.arange(batch * each, dtype=np.int32).reshape(batch, each)
        batches = [_step(FIRST_TOKEN + np.arange(batch), np.full(batch, context + i), tables, size) for i in range(steps)]
        device.step(batches[0])
        began = time.perf_counter()
        for one in batches:
            device.step(one)
        return batch * steps / (time.perf_counter() - began)


def _step(tokens: np.ndarray, positions: np.ndarray, tables: np.ndarray, size: int) -> StepBatch:
    """A step in which each row of `tables` is one sequence, with an equal part of the tokens; one row of logits each."""
    tokens, positions = tokens.astype(np.int32), positions.astype(np.int32)
    count = len(tokens) // len(tables)
    rows = np.repeat(np.arange(len(tables)), count)
    ends = np.arange(0, len(tokens) + 1, count, dtype=np.int32)
    return StepBatch(tokens=tokens, positions=positions,
                     slots=np.ascontiguousarray(tables[rows, positions // size] * size + positions % size)[None],
                     seq_starts=ends, kv_lens=positions[ends[1:] - 1] + 1, block_tables=tables[None], logit_rows=ends[1:] - 1)


def _greedy(new: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
