"""`LLM`: an artifact loaded, and prompts answered."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from inferloom.runtime.artifact import Artifact
from inferloom.runtime.device import open_device
from inferloom.runtime.device.base import Device, StepBatch, memory_needed
from inferloom.runtime.draft_model import DraftModel
from inferloom.runtime.engine import Engine, Stats
from inferloom.runtime.errors import ArtifactError, RequestError
from inferloom.runtime.facts import Facts
from inferloom.runtime.manifest import KERNELS_FILE, Manifest
from inferloom.runtime.outputs import RequestOutput
from inferloom.runtime.params import SamplingParams
from inferloom.runtime.pooling import check_task, shortened
from inferloom.runtime.scheduler import Limits
from inferloom.runtime.speculative import NgramProposer, Proposer, SpeculativeConfig, check_speculation
from inferloom.runtime.state import Group, Held, Tables
from inferloom.runtime.tiers.disk import DiskStore
from inferloom.runtime.tiers.policy import Costs
from inferloom.runtime.tiers.ram import RamStore
from inferloom.runtime.tiers.tiers import Tiers
from inferloom.runtime.tiers.writer import DiskWriter

if TYPE_CHECKING:
    from inferloom.runtime.chat import ChatTemplate

Prompt = str | Sequence[int]
DEFAULT_STATE_BYTES = 4 * 2**30
DEFAULT_DISK_BYTES = 16 * 2**30
_TOKENIZER = "tokenizer/tokenizer.json"
#: Seconds that a process which was killed may take to let go of its folder of state.
_PATIENCE = 3.0


class LLM:
    """An artifact in memory, ready to generate.

    `memory_bytes` bounds everything together (default: what the artifact needs, and for state the least of 4 GiB,
    half of the memory that is free, and all that its limits can use; on a GPU, nine tenths of what is free there).
    `threads` of a CPU defaults to the usable cores, and `pin` keeps each on a core; `gpu` is the driver's number of the
    GPU. State that leaves the pool goes to `ram_bytes` of memory beside it; sessions are saved in the folder `state_dir`,
    at most `disk_bytes` of it. `speculative` is how drafts are made: a config, "ngram", or a draft model's artifact.
    Raises ArtifactError for an artifact that is damaged, foreign or does not fit.
    """

    def __init__(self, path: str | os.PathLike[str], *, memory_bytes: int | None = None, threads: int | None = None,
                 gpu: int = 0, max_num_seqs: int | None = None, max_num_batched_tokens: int | None = None,
                 enable_prefix_caching: bool = True, seed: int | None = None, ram_bytes: int = 0,
                 state_dir: str | os.PathLike[str] | None = None, disk_bytes: int = DEFAULT_DISK_BYTES,
                 speculative: SpeculativeConfig | str | os.PathLike[str] | None = None, pin: bool = False) -> None:
        self.artifact = Artifact.open(Path(path))
        m = self.manifest = self.artifact.manifest
        limits = Limits.of(m, _at_most("max_num_batched_tokens", max_num_batched_tokens, m.dims.tokens),
                           _at_most("max_num_seqs", max_num_seqs, min(m.dims.seqs, m.dims.rows)))
        if speculative is not None:
            check_task(m.task, "generate")
        config = None if speculative is None else SpeculativeConfig.of(speculative)
        if config is not None:
            check_speculation(limits, m.model.name)
        self._opened: list[Device | Proposer | Tiers] = []
        beside = ThreadPoolExecutor(1, "inferloom-open")
        texts = beside.submit(self._open_texts)  # while weights are read
        try:
            budget = default_memory(m) if memory_bytes is None and m.chip.driver == "none" else memory_bytes
            proposer = None if config is None else self._open_proposer(
                config, memory_bytes, threads, gpu, enable_prefix_caching, pin)
            if isinstance(proposer, DraftModel) and memory_bytes is not None:
                budget = memory_bytes - proposer.bytes
            self.device = open_device(self.artifact, budget, threads, gpu, pin)
            self._opened.append(self.device)
            salt = m.files[m.weights.file].blake3.encode()
            page, costs = m.state.bytes_per_block, Costs.unknown()
            disk = None if state_dir is None else DiskStore(state_dir, self.artifact.identity, page, disk_bytes, _PATIENCE)
            tiers = Tiers(page, RamStore(ram_bytes) if ram_bytes else None, disk, costs,
                          None if disk is None else DiskWriter(disk))
            self._opened.append(tiers)
            self.tokenizer, self.chat_template = texts.result()
        except BaseException:
            self.close()
            raise
        finally:
            beside.shutdown()
        self.engine = Engine(self.device, limits, m.model.vocab_size, self.tokenizer, m.model.eos_token_ids,
                             enable_prefix_caching, salt, seed, tiers, proposer=proposer, task=m.task)
        self._count = 0

    def _open_proposer(self, config: SpeculativeConfig, memory_bytes: int | None, threads: int | None, gpu: int,
                       prefix_caching: bool, pin: bool) -> Proposer:
        if config.model is None:
            return NgramProposer(config)
        draft = Artifact.open(Path(config.model))
        m = draft.manifest
        budget = default_memory(m) if memory_bytes is None else shared_memory(self.manifest, m, memory_bytes)
        opened = DraftModel.open(draft, self.artifact, config.num_speculative_tokens, budget, threads, gpu, prefix_caching,
                                 pin)
        self._opened.append(opened)
        return opened

    def _open_texts(self) -> tuple[Tokenizer | None, ChatTemplate | None]:
        """Tokenizer and chat template. Files that nothing here reads are hashed, too: an artifact is whole or refused."""
        from inferloom.runtime.chat import ChatTemplate  # its libraries are imported while weights are read

        made = open_tokenizer(self.artifact), ChatTemplate.of(self.artifact)
        for name in self.manifest.files:
            if name not in (KERNELS_FILE, self.manifest.weights.file):  # the device reads those
                self.artifact.read(name)
        return made

    def generate(self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None,
                 *, on_output: Callable[[RequestOutput], None] | None = None) -> list[RequestOutput]:
        """Answer prompts (texts or token ids, one or many), in their order.

        `params` is one for all, or one each. `on_output` sees every intermediate output. RequestError when a
        prompt or its parameters cannot be served; nothing has run then.
        """
        many = as_prompts(prompts)
        each = list(params) if isinstance(params, Sequence) else [params or SamplingParams()] * len(many)
        if len(each) != len(many):
            raise RequestError(f"{len(many)} prompts came with {len(each)} SamplingParams")
        ids: list[str] = []
        try:
            for prompt, wanted in zip(many, each, strict=True):
                self._count += 1
                tokens = self.encode(prompt) if isinstance(prompt, str) else list(prompt)
                self.engine.add_request(str(self._count), tokens, wanted, prompt if isinstance(prompt, str) else None)
                ids.append(str(self._count))
            done: dict[str, RequestOutput] = {}
            while len(done) < len(ids):
                for output in self.engine.step():
                    if on_output is not None:
                        on_output(output)
                    if output.finished:
                        done[output.request_id] = output
        except BaseException:
            for name in ids:
                self.engine.abort(name)
            raise
        return [done[name] for name in ids]

    def embed(self, prompts: Prompt | Sequence[Prompt], pooling: str | None = None,
              normalize: bool | None = None) -> NDArray[np.float32]:
        """Embeddings f32 [prompts, hidden] of texts or token ids, one or many, in their order.

        `pooling` is "last", the final hidden state of a prompt's last token, or "mean", that of all its tokens; vectors
        have length 1 if `normalize`; None is what the artifact says. A vector's bits depend on its prompt alone.
        RequestError for an artifact that was not compiled for it, or when a prompt cannot be served.
        """
        how, vectors = self.manifest.embedding, dict[str, NDArray[np.float32]]()
        unit = how.normalize if normalize is None else normalize
        ids: list[str] = []
        try:
            for prompt in as_prompts(prompts):
                self._count += 1
                tokens = self.encode(prompt) if isinstance(prompt, str) else list(prompt)
                self.engine.add_embedding(str(self._count), tokens, how.pooling if pooling is None else pooling)
                ids.append(str(self._count))
            while len(vectors) < len(ids):
                for output in self.engine.step():
                    if output.embedding is None:
                        raise RequestError(f"prompt {ids.index(output.request_id)} failed: {output.error}")
                    vectors[output.request_id] = shortened(output.embedding, normalize=unit)
        except BaseException:
            for name in ids:
                self.engine.abort(name)
            raise
        return np.array([vectors[name] for name in ids], np.float32).reshape(len(ids), self.manifest.output.vocab)

    def chat(self, messages: Sequence[Mapping[str, Any]], params: SamplingParams | None = None, *,
             on_output: Callable[[RequestOutput], None] | None = None) -> RequestOutput:
        """Answer a conversation through the artifact's chat template. RequestError when it has none."""
        return self.generate(self.chat_prompt(messages), params, on_output=on_output)[0]

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The token ids of a conversation; the template brings its own special tokens."""
        if self.chat_template is None:
            raise RequestError(f"{self.manifest.model.name} has no chat template: use generate with a prompt")
        return self.encode(self.chat_template.render(messages), add_special_tokens=False)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        if self.tokenizer is None:
            raise RequestError("the artifact has no tokenizer: give token ids")
        return list(self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """Logits f32 [tokens, vocab] after each token of one sequence, for comparing models.

        Runs on blocks of its own, beside what the engine does. Where the tokens of a prompt see each other, all are
        taken as one. RequestError when the sequence does not fit.
        """
        m, engine = self.manifest, self.engine
        check_task(m.task, "generate")
        ids = np.asarray(token_ids, np.int32)
        if ids.ndim != 1 or not 1 <= len(ids) <= engine.longest:
            raise RequestError(f"token_ids must be 1 to {engine.longest} ids")
        chunk = min(m.dims.rows, m.dims.tokens)
        if engine.limits.whole_prompts and len(ids) > chunk:
            raise RequestError(f"tokens that see each other must be computed in one step: at most {chunk}, got {len(ids)}")
        facts = Facts(m.dims.facts, len(ids), engine.eos)
        size, out = m.state.block_tokens, np.empty((len(ids), m.model.vocab_size), np.float32)
        held = [Held() for _ in engine.limits.groups]
        try:
            for group, each in zip(engine.limits.groups, held):
                for _ in range(1 if group.recurrent else -(-len(ids) // size)):
                    each.blocks.append(tuple(engine.pool.allocate() for _ in range(group.tables)))
            tables, pages = Tables(engine.limits.groups, m.dims.blocks_per_seq).of([held])
            for begin in range(0, len(ids), chunk):
                pos = np.arange(begin, min(begin + chunk, len(ids)), dtype=np.int32)
                slots = np.ascontiguousarray(tables[:, 0, pos // size] * size + pos % size)
                batch = StepBatch(tokens=ids[pos], positions=pos, slots=slots, seq_starts=np.array([0, len(pos)], np.int32),
                                  kv_lens=pos[-1:] + 1, block_tables=tables, pages=pages,
                                  logit_rows=np.arange(len(pos), dtype=np.int32),
                                  facts=facts.of(ids.tolist(), begin, begin + len(pos)))
                out[pos] = np.asarray(self.device.step(batch))
        finally:
            for block in (b for each in held for blocks in each for b in blocks):
                engine.pool.release(block)
        return out

    @property
    def stats(self) -> Stats:
        return self.engine.stats()

    def close(self) -> None:
        """Give threads, memory and the folder of state back."""
        for each in reversed(self._opened):
            each.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()


def shared_memory(m: Manifest, draft: Manifest, memory_bytes: int) -> int:
    """Bytes of `memory_bytes` for a draft model, so that its state holds as many tokens as that of the model it drafts for."""
    fixed, each = [memory_needed(x, 0)[0] for x in (m, draft)], [x.state.bytes_per_block / x.state.block_tokens * sum(
        g.tables for g in x.state.groups) for x in (m, draft)]
    left = max(0, memory_bytes - sum(fixed))
    return min(fixed[1] + int(left * each[1] / sum(each)), default_memory(draft))


def default_memory(m: Manifest) -> int:
    """The memory budget in bytes when none is given."""
    mem = m.memory
    groups = [Group.of(g) for g in m.state.groups]
    each = sum(g.most(m.model.max_model_len, m.dims.tokens, m.state.block_tokens) for g in groups)
    useful = m.dims.seqs * each * mem.bytes_per_block
    state = min(DEFAULT_STATE_BYTES, _free_memory() // 2, useful)
    fixed = m.files[m.weights.file].bytes + mem.workspace + mem.inputs
    return fixed + max(state, mem.bytes_per_block)


def _free_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return DEFAULT_STATE_BYTES


def _at_most(name: str, wanted: int | None, limit: int) -> int:
    if wanted is not None and not 1 <= wanted <= limit:
        raise RequestError(f"{name}={wanted} must be 1 to {limit}, which the artifact was compiled for")
    return limit if wanted is None else wanted


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several as a list of them."""
    if isinstance(prompts, str):
        return [prompts]
    if all(isinstance(p, (int, np.integer)) for p in prompts):
        return [prompts] if len(prompts) else []  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def open_tokenizer(artifact: Artifact) -> Tokenizer | None:
    """The artifact's tokenizer, or None when it has none. ArtifactError when it cannot be read."""
    if _TOKENIZER not in artifact.manifest.files:
        return None
    data = artifact.read(_TOKENIZER)
    try:
        tokenizer = Tokenizer.from_str(data.decode())
    except Exception as error:  # the library raises plain Exception
        raise ArtifactError(f"{_TOKENIZER} cannot be read: {error}") from None
    tokenizer.no_truncation()  # files often carry the truncation of a training run
    tokenizer.no_padding()
    return tokenizer
