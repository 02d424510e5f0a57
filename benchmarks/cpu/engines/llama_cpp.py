"""llama.cpp, through llama-cpp-python's bindings of its C functions: one batch a step over all sequences."""

from __future__ import annotations

import ctypes
from typing import Any

import llama_cpp as lib
import numpy as np

BATCH, CONTEXT = 2048, 768  # tokens of a step, tokens of a sequence


class Engine:
    version = f"llama-cpp-python {lib.__version__}"

    def __init__(self, model: str, threads: int, options: dict[str, Any]) -> None:
        self._threads, self._sequences = threads, 0
        self._context: Any = None
        self._batch: Any = None
        self._log = lib.llama_log_callback(lambda level, text, data: None)
        lib.llama_log_set(self._log, ctypes.c_void_p(0))
        lib.llama_backend_init()
        parameters = lib.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self._model = lib.llama_model_load_from_file(model.encode(), parameters)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {model}")
        self._vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))

    def generate(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        self._prepare(len(prompts))
        asked = [(t, at, s, at == len(p) - 1) for s, p in enumerate(prompts) for at, t in enumerate(p)]
        latest: dict[int, int] = {}
        for begin in range(0, len(asked), BATCH):
            latest |= self._step(asked[begin:begin + BATCH])
        made = [[latest[s]] for s in range(len(prompts))]
        for count in range(new - 1):
            got = self._step([(made[s][-1], len(p) + count, s, True) for s, p in enumerate(prompts)])
            for s, ids in enumerate(made):
                ids.append(got[s])
        return made

    def _prepare(self, sequences: int) -> None:
        """An empty context for so many sequences."""
        if self._context and self._sequences == sequences:
            lib.llama_memory_clear(lib.llama_get_memory(self._context), False)
            return
        if self._context:
            lib.llama_batch_free(self._batch)
            lib.llama_free(self._context)
        parameters = lib.llama_context_default_params()
        parameters.n_ctx, parameters.n_batch, parameters.n_seq_max = CONTEXT * sequences, BATCH, sequences
        parameters.n_threads = parameters.n_threads_batch = self._threads
        parameters.no_perf = True
        self._context = lib.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise RuntimeError(f"llama.cpp makes no context for {sequences} sequences")
        self._batch, self._sequences = lib.llama_batch_init(BATCH, 0, 1), sequences

    def _step(self, items: list[tuple[int, int, int, bool]]) -> dict[int, int]:
        """The next token of each sequence that asks: (token, position, sequence, whether it asks)."""
        batch = self._batch
        batch.n_tokens = len(items)
        for i, (token, position, sequence, asks) in enumerate(items):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, asks
            batch.seq_id[i][0] = sequence
        if code := lib.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode: {code}")
        return {sequence: int(np.ctypeslib.as_array(lib.llama_get_logits_ith(self._context, i),
                                                    shape=(self._vocabulary,)).argmax())
                for i, (_, _, sequence, asks) in enumerate(items) if asks}
