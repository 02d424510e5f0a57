"""Whole models: every kernel against the NumPy reference, then prefill, decode and start-up, next to transformers."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from inferloom.benchmarks.gpu.model import Model, Read, batch
from inferloom.benchmarks.gpu.session import DEVICE, Gpu, Recorder, error, quantiles
from inferloom.ir import op as ops
from inferloom.ir.ops.attention import KVArrays
from inferloom.ir.types import DType, StateType, TensorType
from inferloom.runtime.device.base import StepBatch

#: New tokens of each sequence, and its tokens in all: decode, both kinds at once, many rows, a long prefill.
BATCHES = {"decode": ((1, 1, 3, 2), (70, 333, 3, 40)), "mixed": ((1, 40, 9), (300, 45, 9)),
           "many": ((1,) * 70 + (130,), (*range(40, 110), 200)), "prefill": ((600, 1, 1), (900, 2, 1000))}
#: Tokens of the steps whose kernels are timed, and those of the steps that make up a prompt.
TIMED, CHUNKS = (1, 64, 2048), (130, 70, 1, 1)
#: Sequences, tokens of each prompt, tokens generated.
LOADS = tuple((b, *size) for size in ((128, 128), (2048, 256)) for b in (1, 8, 64))
#: Of the logits of a whole model in bf16, next to transformers in float32: relative to the largest.
MODEL_TOLERANCE = 0.05


def folders(gpu: Gpu) -> list[Path]:
    """Models in the order in which they are worth measuring: the smallest first."""
    def weights(folder: Path) -> int:
        return int(json.loads((folder / "manifest.json").read_text())["memory"]["weights"])

    return sorted((gpu.folder / "models").iterdir(), key=weights)


def kernels(gpu: Gpu, recorder: Recorder, sets: list[dict[str, Any]]) -> None:
    """Every kernel of every model in batches of all kinds against the reference, then the time of each."""
    for folder in folders(gpu):
        names = [f"{folder.name}-{b}" for b in BATCHES] + [f"{folder.name}-times-{t}" for t in TIMED]
        if (recorder.quick and folder != folders(gpu)[0]) or not any([recorder.wanted(n) for n in names]):
            continue
        blocks = 256
        model = Model(gpu, folder, blocks)
        for name, (counts, lens) in BATCHES.items():
            if recorder.wanted(f"{folder.name}-{name}") and max(len(counts), sum(counts) // 16) <= model.manifest.dims.seqs:
                with recorder.case(f"{folder.name}-{name}", tokens=sum(counts)) as made:
                    made["kernels"] = _check(gpu, model, _random_batch(model, counts, lens, blocks), blocks)
                    made["error"] = max((k["error"] for k in made["kernels"]), key=lambda e: (not e["ok"], e["max"]))
        for tokens in () if recorder.quick else TIMED:
            if recorder.wanted(name := f"{folder.name}-times-{tokens}"):
                with recorder.case(name, tokens=tokens) as made:
                    counts, lens = ((tokens,), (tokens,)) if tokens > 64 else ((1,) * tokens, (100,) * tokens)
                    made["kernels"] = _times(gpu, model, _random_batch(model, counts, lens, blocks))
        del model
        torch.cuda.empty_cache()


def _random_batch(model: Model, counts: tuple[int, ...], lens: tuple[int, ...], blocks: int) -> StepBatch:
    rng, size = np.random.default_rng(0), model.manifest.state.block_tokens
    used = np.cumsum([0, *(-(-n // size) for n in lens)])
    order, tables = rng.permutation(blocks), np.zeros((len(lens), int(np.diff(used).max())), np.int64)
    for i, n in enumerate(np.diff(used)):  # blocks are shared where there are too few; only their own tokens must not be
        tables[i, :n] = order[np.arange(used[i], used[i + 1]) % blocks]
    return batch(counts, lens, tables, rng.integers(0, model.manifest.model.vocab_size, sum(counts)), size)


def _check(gpu: Gpu, model: Model, step: StepBatch, blocks: int) -> list[dict[str, Any]]:
    """Run a step kernel by kernel; the first call of each is compared."""
    dims = model.send(step)
    model.regions["workspace"].fill_(255)
    counts = {"tokens": dims[0], "seqs": dims[1], "rows": dims[2]}
    seen: set[int] = set()
    made = []
    for node, call, launches in model.groups():
        if call.kernel in seen:
            gpu.run(launches, dims)
            continue
        seen.add(call.kernel)
        operands = [None if v is None else model.read(v, counts, blocks) for v in node.operands]
        if not any(v in node.results for v in node.operands):
            model.poison(node)
        gpu.run(launches, dims)
        worst = {"max": 0.0, "rms": 0.0, "ok": True, "tolerance": 0.0}
        for value, want in zip(node.results, ops.run_reference("kernel", operands, node.attrs), strict=True):
            got = model.read(value, counts, blocks)
            states = (v for v in node.operands if v is not None and isinstance(v.type, StateType))
            stored = {v.type.dtype for v in (value, *states)}
            tolerance = 2.0**-7 if DType.BF16 in stored else 1e-3  # sums in another order
            whole: Any = want
            pairs = [(got.k, whole.k), (got.v, whole.v)] if isinstance(got, KVArrays) else [(got, whole)]
            for g, w in pairs:
                if g.size:
                    worst = max(worst, error(torch.from_numpy(g), torch.from_numpy(np.asarray(w)), tolerance),
                                key=lambda e: (not e["ok"], e["max"]))
        made.append({"symbol": model.selection.sources[call.kernel].symbol, "error": worst})
    return made


def _times(gpu: Gpu, model: Model, step: StepBatch) -> list[dict[str, Any]]:
    """The time of each kernel, run for all layers in a row: weights come from memory, activations from the cache."""
    dims = model.send(step)
    counts = {"tokens": dims[0], "rows": dims[2]}
    groups: dict[int, list[Any]] = {}
    for node, call, launches in model.groups():
        groups.setdefault(call.kernel, [node, 0, []])
        groups[call.kernel][1] += 1
        groups[call.kernel][2] += launches
    made = []
    for number, (node, calls, launches) in groups.items():
        size = 0
        for value in (*node.operands, *node.results):
            if value is not None and isinstance(value.type, TensorType):
                symbolic = not value.type.is_static
                one = value.type.max_size * value.type.dtype.itemsize
                rows = counts.get(str(value.type.shape[0]).split("+")[0], 1)
                embedding = value in model.plan.weights and node.attrs["kind"] == "row" and one > 1 << 24
                size += one // value.type.shape[0].bound * rows if symbolic and hasattr(value.type.shape[0], "bound") else (
                    0 if embedding or symbolic else one)
        repeat = max(1, 32 // calls)
        us = gpu.time(launches * repeat, dims, calls * repeat)
        made.append({"symbol": model.selection.sources[number].symbol, "calls": calls, "us": us, "bytes": size})
    sampling = model.launches[sum(len(g[2]) for g in groups.values()):]
    made.append({"symbol": "sampling", "calls": 1, "us": gpu.time(sampling * 32, dims, 32), "bytes": 0})
    return made


# -- models

def models(gpu: Gpu, recorder: Recorder, sets: list[dict[str, Any]]) -> None:
    for folder in folders(gpu):
        names = [f"{folder.name}-logits", *(f"{folder.name}-{b}x{p}+{n}" for b, p, n in LOADS)]
        if not any([recorder.wanted(n) for n in names]):
            continue
        config = json.loads((folder / "buffers.json").read_text())["config"]
        peer = _transformers(config)
        m = json.loads((folder / "manifest.json").read_text())
        room = torch.cuda.mem_get_info()[0] - (m["memory"]["weights"] + m["memory"]["workspace"]) - (12 << 30)
        blocks = int(min(64 * (2304 // 32 + 1), room // m["memory"]["bytes_per_block"]))
        model = Model(gpu, folder, blocks, _reader(peer))
        if recorder.wanted(names[0]):
            with recorder.case(names[0]) as made:
                made["error"] = _logits(model, peer)
        for seqs, prompt, new in LOADS:
            name = f"{folder.name}-{seqs}x{prompt}+{new}"
            if seqs * -(-(prompt + new) // 32) > blocks:
                recorder.skip(name, "not enough memory")
            elif recorder.wanted(name):
                with recorder.case(name, seqs=seqs, prompt=prompt, new=new) as made:
                    made |= _generate(gpu, model, seqs, prompt, new)
                    if prompt == 128 and seqs < 64 and recorder.left > 45:
                        recorder.peer(made, "transformers", partial(_eager, peer, seqs, prompt))
                        if recorder.left > 90:
                            recorder.peer(made, "transformers-compiled", partial(_compiled, peer, seqs, prompt))
        del model, peer
        torch.cuda.empty_cache()


def _transformers(config: dict[str, Any]) -> Any:
    import transformers

    made = getattr(transformers, config["kind"])(**config["arguments"])
    with torch.device(DEVICE):
        return transformers.AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16).eval()


def _reader(peer: Any) -> Read:
    state = peer.state_dict()
    return lambda source, shape: state[source]  # type: ignore[no-any-return]


def _logits(model: Model, peer: Any) -> dict[str, Any]:
    """A prompt in two steps and two decode steps, against transformers in float32 over the same tokens."""
    tokens = np.random.default_rng(1).integers(0, model.manifest.model.vocab_size, sum(CHUNKS))
    ends = np.cumsum(CHUNKS).tolist()
    size = model.manifest.state.block_tokens
    tables = np.arange(-(-len(tokens) // size))[None]
    got = []
    for begin, end in zip((0, *ends), ends):
        step = batch((end - begin,), (end,), tables, tokens[begin:end], size, range(max(0, end - begin - 4), end - begin))
        got.append(model.step(step).clone())
    wanted = [i for begin, end in zip((0, *ends), ends) for i in range(max(begin, end - 4), end)]
    with torch.no_grad():
        peer.float()
        want = peer(input_ids=torch.from_numpy(tokens)[None].to(DEVICE), use_cache=False).logits[0, wanted].float()
        peer.bfloat16()
    made = error(torch.cat(got), want, MODEL_TOLERANCE)
    made["same_choice"] = float((torch.cat(got).argmax(-1) == want.argmax(-1)).float().mean())
    return made


def _generate(gpu: Gpu, model: Model, seqs: int, prompt: int, new: int) -> dict[str, Any]:
    """Prefill and greedy decoding as the engine does them, a step at a time, with the wall's clock."""
    m, size, rng = model.manifest, model.manifest.state.block_tokens, np.random.default_rng(2)
    width = -(-(prompt + new) // size)
    tables = rng.permutation(seqs * width).reshape(seqs, width)
    prompts = rng.integers(0, m.model.vocab_size, (seqs, prompt))
    top = m.output.top
    if top is None:
        raise ValueError("the model finds no largest logits")
    keys = gpu.launcher.pinned(m.dims.rows * top.count * 8)
    all_launches = (type(model.launches[0]) * len(model.launches))(*model.launches)

    def finish(rows: int) -> np.ndarray:
        gpu.launcher.download(keys.ctypes.data, model.regions["workspace"].data_ptr() + top.keys, rows * top.count * 8)
        gpu.launcher.sync()
        return 0x7FFFFFFF - (keys.view(np.int64)[:rows * top.count:top.count] & 0xFFFFFFFF)

    torch.cuda.synchronize()
    started, first, tokens = time.perf_counter(), 0.0, np.zeros(seqs, np.int64)
    per = max(1, m.dims.tokens // prompt)
    for begin in range(0, seqs, per):
        some = slice(begin, min(seqs, begin + per))
        count = len(prompts[some])
        step = batch((prompt,) * count, (prompt,) * count, tables[some], prompts[some].reshape(-1), size)
        gpu.launcher.step(all_launches, model.send(step))
        tokens[some] = finish(count)
        first = first or time.perf_counter() - started
    prefill = time.perf_counter() - started
    dims = [seqs, seqs, seqs, 0, seqs]
    graph, walls = gpu.launcher.capture(all_launches, dims), []
    try:
        for at in range(prompt + 1, prompt + new):
            now = time.perf_counter()
            if model.send(batch((1,) * seqs, (at,) * seqs, tables, tokens, size)) != dims:
                raise ValueError("a decode step is not what was captured")
            gpu.launcher.replay(graph)
            tokens = finish(seqs)
            walls.append((time.perf_counter() - now) * 1e6)
    finally:
        gpu.launcher.drop(graph)
    kv = m.state.bytes_per_block // size
    return {"us": gpu.time(model.launches, dims, 1, 0.2), "wall_us": quantiles(walls[4:]), "ttft_s": first,
            "prefill_tokens_per_s": seqs * prompt / prefill, "tokens_per_s": seqs * 1e6 / quantiles(walls[4:])["p50"],
            "bytes": model.weight_bytes + seqs * (prompt + new - 1) * kv, "launches": model.active(dims), "graphs": 1}


# -- peers

@contextmanager
def limit(seconds: int) -> Iterator[None]:
    """TimeoutError after so many seconds."""
    def ring(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _decode_loop(step: Callable[[torch.Tensor, int], torch.Tensor], seqs: int, prompt: int, steps: int) -> dict[str, float]:
    tokens, walls = torch.zeros(seqs, 1, dtype=torch.int64, device=DEVICE), []
    for i in range(steps):
        torch.cuda.synchronize()
        now = time.perf_counter()
        tokens = step(tokens, prompt + i).argmax(-1)
        tokens.cpu()
        walls.append((time.perf_counter() - now) * 1e6)
    return quantiles(walls[steps // 2:])


def _eager(peer: Any, seqs: int, prompt: int) -> dict[str, float]:
    """transformers as it comes, with its dynamic cache."""
    with limit(40), torch.no_grad():
        ids = torch.randint(0, peer.config.vocab_size, (seqs, prompt), device=DEVICE)
        cache = peer(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
        return _decode_loop(lambda t, at: peer(input_ids=t, past_key_values=cache, use_cache=True).logits, seqs, prompt, 24)


def _compiled(peer: Any, seqs: int, prompt: int) -> dict[str, float]:
    """A static cache and torch.compile with graphs, in the way of gpt-fast."""
    from transformers import StaticCache

    with limit(120), torch.no_grad():
        torch.compiler.reset()
        cache = StaticCache(config=peer.config, max_cache_len=prompt + 64)
        ids = torch.randint(0, peer.config.vocab_size, (seqs, prompt), device=DEVICE)
        peer(input_ids=ids, past_key_values=cache, cache_position=torch.arange(prompt, device=DEVICE), logits_to_keep=1)
        compiled = torch.compile(peer.forward, mode="reduce-overhead")

        def step(tokens: torch.Tensor, at: int) -> torch.Tensor:
            where = torch.tensor([at], device=DEVICE)
            return compiled(input_ids=tokens.clone(), position_ids=where.expand(seqs, 1), past_key_values=cache,
                            cache_position=where).logits.clone()

        return _decode_loop(step, seqs, prompt, 24)


# -- start-up

def start(gpu: Gpu, recorder: Recorder, sets: list[dict[str, Any]]) -> None:
    """Process start to first token, in a fresh process without torch; weights from a file in the page cache."""
    for folder in folders(gpu):
        if recorder.wanted(name := f"start-{folder.name}"):
            with recorder.case(name) as made:
                torch.cuda.empty_cache()
                now = time.perf_counter()
                command = [sys.executable, "-I", str(Path(__file__).with_name("first_token.py")), str(folder)]
                done = subprocess.run(command, capture_output=True, text=True, timeout=120)
                if done.returncode:
                    raise RuntimeError(done.stderr[-1500:])
                made["seconds"] = json.loads(done.stdout.splitlines()[-1])
                made["wall_s"] = time.perf_counter() - now - made["seconds"]["make_file"]
