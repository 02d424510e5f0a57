"""Paged attention kernels, decode and prefill, next to torch's attention over contiguous keys and values."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, bias, sdpa_kernel

from inferloom.benchmarks.gpu.session import DEVICE, Gpu, Recorder, copies, error, ints, poisoned, random
from inferloom.benchmarks.gpu.shapes import BLOCK, CONTEXT, DECODE, MAX_SEQS, PREFILL
from inferloom.runtime.device.base import make_tiles
from inferloom.runtime.manifest import Tiles

#: Bytes of keys and values that one case may have.
MOST = 5 << 30
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def attention(gpu: Gpu, recorder: Recorder, sets: list[dict[str, Any]]) -> None:
    found = [s for s in sets if s["op"] in ("decode", "prefill")]
    for heads in dict.fromkeys(tuple(s["heads"]) for s in found):
        label = "{}-{}-{}".format(*heads)
        for op, sizes in (("decode", DECODE), ("prefill", PREFILL)):
            entries = [s for s in found if s["op"] == op and tuple(s["heads"]) == heads]
            for a, b in sizes:
                seqs, new, context = (a, 1, b) if op == "decode" else (1, a, a + b)
                name = f"{op}-{label}-{a}x{b}"
                size = seqs * context * heads[1] * heads[2] * 4
                if size > MOST:
                    recorder.skip(name, f"{size / 1e9:.0f} GB of keys and values")
                elif not (recorder.quick and seqs * context > 4096) and recorder.wanted(name):
                    with recorder.case(name, op=op, heads=heads, seqs=seqs, new=new, context=context) as made:
                        _Case(gpu, recorder, made, heads, seqs, new, context).measure(entries)


class _Case:
    """`seqs` sequences of `new` tokens each, the last of about `context` tokens."""

    def __init__(self, gpu: Gpu, recorder: Recorder, made: dict[str, Any], heads: tuple[int, ...], seqs: int, new: int,
                 context: int) -> None:
        self.gpu, self.recorder, self.made, self.new = gpu, recorder, made, new
        self.hq, self.kv, self.dim = heads
        self.seqs, self.context = seqs, context
        # Not all equal, nor multiples of a tile.
        self.lens = np.array([context - (i * 5) % 32 * (new == 1) for i in range(seqs)], np.int32)
        self.starts = np.arange(seqs + 1, dtype=np.int32) * new
        self.blocks = -(-context // BLOCK)
        size = seqs * context * self.kv * self.dim * 4
        self.count = copies(size)
        self.q = random(seqs * new, self.hq, self.dim)
        self.state = random(self.count * seqs * self.blocks, 2, self.kv, BLOCK, self.dim)
        order = torch.randperm(len(self.state), device=DEVICE).int().view(self.count, seqs, self.blocks)
        self.tables = torch.zeros(self.count, MAX_SEQS, CONTEXT // BLOCK, dtype=torch.int32, device=DEVICE)
        self.tables[:, :seqs, :self.blocks] = order
        seen = int(sum(new * (n - new) + new * (new + 1) // 2 for n in self.lens.tolist()))
        made |= {"bytes": int(self.lens.sum()) * self.kv * self.dim * 4 + 2 * self.q.nbytes,
                 "flops": 4 * seen * self.hq * self.dim}

    def measure(self, entries: list[dict[str, Any]]) -> None:
        rows = sorted({0, len(self.q) // 3, len(self.q) // 2, len(self.q) - 1})
        want, measured = self._reference(rows), []
        for entry in entries:
            tiles = Tiles(entry["tile_tokens"], 0) if entry["op"] == "prefill" else Tiles(1, entry["tile_tokens"])
            q_tiles, d_tiles = make_tiles(self.starts, tiles)
            dims = [len(self.q), self.seqs, self.seqs, len(q_tiles), len(d_tiles)]
            none = ints([[0, 0, 0]])
            held = {"q": self.q, "state": self.state, "seq_starts": ints(self.starts), "kv_lens": ints(self.lens),
                    "q_tiles": ints(q_tiles) if len(q_tiles) else none, "d_tiles": ints(d_tiles) if len(d_tiles) else none,
                    "dims": ints([*dims, 0, 0, 0]), "out": poisoned(len(self.q) + 1, self.hq * self.dim)}
            scratch = torch.full((entry["scratch"] + 256,), 255, dtype=torch.uint8, device=DEVICE)
            timed = [la for t in self.tables for la in self.gpu.launches(entry, held | {"block_tables": t}, scratch)]
            self.gpu.run(timed[:len(entry["kernels"])], dims)
            out = held["out"]
            wrong = error(out[rows].view(len(rows), self.hq, self.dim), want)
            wrong["ok"] = wrong["ok"] and not bool(out[:-1].isnan().any()) and bool(out[-1].isnan().all())
            us = {} if self.recorder.quick or not wrong["ok"] else self.gpu.time(timed, dims, self.count, 0.015)
            measured.append({"name": entry["name"], "config": entry["config"], "hash": entry["hash"], "error": wrong, "us": us})
        good = sorted((e for e in measured if e["us"]), key=lambda e: e["us"]["p50"])
        self.made |= {"candidates": measured,
                      "error": max((e["error"] for e in measured), key=lambda e: (not e["ok"], e["max"]))}
        if good:
            self.made |= {"us": good[0]["us"], "best": good[0]["name"]}
            self._peers()

    def _dense(self, copy: int, seq: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [heads, tokens, dim] of a sequence."""
        picked = self.state[self.tables[copy, seq, :self.blocks].long()]
        k, v = (picked[:, i].transpose(0, 1).reshape(self.kv, -1, self.dim)[:, :int(self.lens[seq])] for i in (0, 1))
        return k, v

    def _reference(self, rows: list[int]) -> torch.Tensor:
        made = []
        for row in rows:
            seq = row // self.new
            k, v = (x.float().repeat_interleave(self.hq // self.kv, 0) for x in self._dense(0, seq))
            last = int(self.lens[seq]) - self.new + row % self.new
            s = torch.einsum("hd,htd->ht", self.q[row].float(), k[:, :last + 1]) * self.dim**-0.5
            made.append(torch.einsum("ht,htd->hd", s.softmax(-1), v[:, :last + 1]))
        return torch.stack(made)

    def _peers(self) -> None:
        """torch's attention; its keys and values lie in one piece, which is easier than pages."""
        q = random(self.seqs, self.hq, self.new, self.dim)
        pairs = [[random(self.seqs, self.kv, self.context, self.dim) for _ in range(2)] for _ in range(self.count)]
        causal = self.new > 1
        mask = bias.causal_lower_right(self.new, self.context) if causal and self.new != self.context else None

        def call(k: torch.Tensor, v: torch.Tensor) -> Callable[[], torch.Tensor]:
            return lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal and mask is None,
                                                          enable_gqa=True)

        for name, backend in BACKENDS.items():
            def measure(backend: SDPBackend = backend) -> dict[str, float]:
                with sdpa_kernel(backend):
                    return self.gpu.time_torch([call(k, v) for k, v in pairs])
            self.recorder.peer(self.made, name, measure)
        if self.new in (2048, 8192) and self.new == self.context and self.recorder.left > 60:
            self.recorder.peer(self.made, "flex", lambda: self._flex(q, pairs))

    def _flex(self, q: torch.Tensor, pairs: list[list[torch.Tensor]]) -> dict[str, float]:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, self.new, self.context, device=DEVICE)
        compiled = torch.compile(flex_attention, dynamic=False)
        calls = [partial(compiled, q, k, v, block_mask=mask, enable_gqa=True) for k, v in pairs]
        return self.gpu.time_torch(calls, graph=False)
