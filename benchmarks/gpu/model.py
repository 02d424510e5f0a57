"""A whole model on the GPU: its kernels in the step plan, its memory as torch tensors, its graph as the reference."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from inferloom.benchmarks.gpu.session import DEVICE, Gpu
from inferloom.compiler.kernels import KernelCall, select_kernels
from inferloom.compiler.plan import Rows, plan_memory, row_elements, tensor_bytes
from inferloom.ir import op as ops
from inferloom.ir.graph import Node, Value
from inferloom.ir.ops.attention import KVArrays
from inferloom.ir.text import parse_graph
from inferloom.ir.types import DType, StateType, TensorType
from inferloom.runtime.device.base import StepBatch, fill_inputs, input_views
from inferloom.runtime.device.launcher import Launch
from inferloom.runtime.manifest import MANIFEST, inputs_layout, loads
from inferloom.targets.triton.codegen import TritonTarget

TORCH = {DType.F32: torch.float32, DType.F16: torch.float16, DType.BF16: torch.bfloat16, DType.I32: torch.int32}
Read = Callable[[str, tuple[int, ...]], torch.Tensor]


class Model:
    """A model of build.py with room for `blocks` blocks of state; weights are what `read(source, shape)` gives."""

    def __init__(self, gpu: Gpu, folder: Path, blocks: int, read: Read | None = None) -> None:
        self.gpu, self.manifest = gpu, loads((folder / MANIFEST).read_bytes())
        m, wanted = self.manifest, TritonTarget.lowering
        self.graph = parse_graph((folder / "graph.txt").read_text())
        self.plan = plan_memory(self.graph, Rows(wanted.row_align, wanted.avoid))
        self.selection = select_kernels(self.plan)
        about = json.loads((folder / "buffers.json").read_text())
        self.config, self._buffers = about["config"], about["buffers"]
        self._nodes, self._sources = self.graph.producers(), {p.value: p for p in self.graph.params}
        self.layout = inputs_layout(m.dims, m.tiles, m.state)[0]
        sizes = {"weights": m.memory.weights, "workspace": m.memory.workspace, "input": m.memory.inputs,
                 "state": blocks * m.state.bytes_per_block}
        # Of 255s, floats are NaN.
        self.regions = {name: torch.full((max(size, 256),), 255, dtype=torch.uint8, device=DEVICE)
                        for name, size in sizes.items()}
        self.regions["state"].view(torch.bfloat16).normal_()
        self.mirror = gpu.launcher.pinned(m.memory.inputs)
        self.mirror[:] = 0
        self.views = input_views(m, self.mirror)
        for value in self.plan.weights:
            self._memory(value)[:] = self._constant(value, read or _random).reshape(-1)
        self.launches = [self._launch(folder, number) for number in range(len(m.plan))]
        self.weight_bytes = sum(tensor_bytes(v.type) for v in self._matmul_weights())  # type: ignore[arg-type,misc]

    # -- memory

    def _memory(self, value: Value, count: int | None = None) -> torch.Tensor:
        """A value's elements: all of a weight, `count` rows of an activation with the gaps between them."""
        place, item = self.plan.places[value], value.type.dtype.itemsize
        size = prod(int(str(d)) for d in value.type.shape) if count is None else count * place.ld  # type: ignore[union-attr,misc]
        return self.regions[place.space][place.offset:place.offset + size * item].view(TORCH[value.type.dtype])

    def _constant(self, value: Value, read: Read) -> torch.Tensor:
        """A weight's value: an expression over tensors of the checkpoint, on the GPU."""
        if value in self._sources:
            source, shape = self._sources[value].source, tuple(int(str(d)) for d in value.type.shape)  # type: ignore[union-attr]
            if source in self._buffers:
                return torch.tensor(self._buffers[source], device=DEVICE).view(shape)
            return read(source, shape).to(DEVICE)
        node = self._nodes[value]
        args = [self._constant(v, read) for v in node.operands if v is not None]
        if node.op == "cast":
            return args[0].to(TORCH[node.attrs["dtype"]])  # type: ignore[index]
        if node.op == "concat":
            return torch.cat(args, int(str(node.attrs["axis"])))
        if node.op == "interleave" and node.attrs["group"] == 1:
            return torch.stack(args, 1).flatten(0, 1)
        if node.op == "pack_linear" and args[0].shape[1] % 16 == 0:  # rows as they are
            return args[0]
        made = ops.run_reference(node.op, [a.float().cpu().numpy() for a in args], node.attrs)
        return torch.from_numpy(np.ascontiguousarray(made[0])).to(DEVICE)

    def _launch(self, folder: Path, number: int) -> Launch:
        call = self.manifest.plan[number]
        kernel = self.manifest.kernels[call.kernel]
        launch, grid = kernel.launch, kernel.grid
        if launch is None:
            raise TypeError(kernel)
        args = [self.regions[a.space].data_ptr() + (self.layout[a.name][0] if a.name else a.offset or 0) for a in call.args]
        return self.gpu.launch(folder / launch.file, kernel.symbol, (grid.dim, grid.tile, grid.mult),
                               (launch.least, launch.most), (launch.threads, launch.shared), args)

    # -- the plan, by kernel of the graph

    def groups(self) -> Iterator[tuple[Node, KernelCall, list[Launch]]]:
        """Each kernel node of the graph with its launches, in order; those of sampling are left over."""
        symbols = [self.manifest.kernels[c.kernel].symbol for c in self.manifest.plan]
        at = 0
        for node, call in zip(self.plan.kernels, self.selection.calls, strict=True):
            symbol = self.selection.sources[call.kernel].symbol
            count = sum(k.symbol.startswith(symbol) for k in self.manifest.kernels)
            if not all(s.startswith(symbol) for s in symbols[at:at + count]):
                raise ValueError(f"the plan of {self.manifest.model.name} does not fit its graph at launch {at}")
            yield node, call, self.launches[at:at + count]
            at += count

    def _matmul_weights(self) -> list[Value]:
        found = {v: None for node in self.plan.kernels if node.attrs["kind"] == "matmul" for v in node.operands
                 if v in self.plan.weights}
        return list(found)  # type: ignore[arg-type]

    def active(self, dims: Sequence[int]) -> int:
        """Launches of a step that run."""
        return sum(la.dim < 0 or (la.least <= dims[la.dim] <= la.most and dims[la.dim] > 0) for la in self.launches)

    # -- steps

    def send(self, batch: StepBatch) -> list[int]:
        """Upload a batch; its counts."""
        dims = fill_inputs(batch, self.manifest, self.views)
        self.gpu.launcher.upload(self.regions["input"].data_ptr(), self.mirror.ctypes.data, self.mirror.size)
        return dims

    def step(self, batch: StepBatch) -> torch.Tensor:
        """The logits [rows, vocab] of a step."""
        torch.cuda.synchronize()
        dims = self.send(batch)
        self.gpu.launcher.step((Launch * len(self.launches))(*self.launches), dims)
        self.gpu.launcher.sync()
        return self.logits(len(batch.logit_rows))

    def logits(self, rows: int) -> torch.Tensor:
        out = self.manifest.output
        data = self.regions["workspace"][out.offset:out.offset + rows * out.ld * 4].view(torch.float32)
        return data.view(rows, out.ld)[:, :out.vocab]

    # -- values for the NumPy reference

    def read(self, value: Value, counts: dict[str, int], blocks: int) -> Any:
        """A value of the graph as the reference holds it."""
        place, type = self.plan.places[value], value.type
        if isinstance(type, StateType):
            stride = self.plan.bytes_per_block
            pool = self.regions["state"][:blocks * stride].view(blocks, stride)
            data = pool[:, place.offset:place.offset + type.bytes_per_block].contiguous().view(TORCH[type.dtype]).float()
            split = type.heads * type.block_tokens * type.k_dim

            def part(data: Any, dim: int) -> np.ndarray:
                held = data.view(blocks, type.heads, type.block_tokens, dim).transpose(1, 2).flatten(0, 1).cpu().numpy()
                return np.asarray(held)

            k = part(data[:, :split], type.k_dim)
            return KVArrays(k, k[..., :type.v_dim] if type.latent else part(data[:, split:], type.v_dim), type)
        if not isinstance(type, TensorType):
            raise TypeError(value)
        if place.space == "input":
            array, dim = self.views[place.name], str(type.shape[0])
            return array[:counts["seqs"] + 1 if dim == "seqs+1" else counts[dim]]
        if place.space == "weights":
            return _numpy(self._memory(value)).reshape([int(str(d)) for d in type.shape])
        rows = counts[str(type.shape[0])]
        data = self._memory(value, rows).view(rows, place.ld)[:, :row_elements(type)]
        return _numpy(data).reshape(rows, *[int(str(d)) for d in type.shape[1:]])

    def poison(self, node: Node) -> None:
        for value in node.results:
            if isinstance(value.type, TensorType):
                bound = value.type.shape[0].bound  # type: ignore[union-attr]
                self._memory(value, bound).view(torch.uint8).fill_(255)


def _numpy(x: torch.Tensor) -> np.ndarray:
    return (x.float() if x.dtype.is_floating_point else x).cpu().numpy()  # type: ignore[no-any-return]


def _random(source: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Weights that keep activations near one."""
    x = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE)
    return x.normal_(1, 0.1) if len(shape) == 1 else x.normal_(0, shape[-1]**-0.5)


def batch(counts: Sequence[int], lens: Sequence[int], tables: np.ndarray, tokens: np.ndarray, block_tokens: int,
          rows: Sequence[int] | None = None) -> StepBatch:
    """Sequences of `counts` new tokens, the last of `lens`; logits of each sequence's last token, or of `rows`."""
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    positions = np.concatenate([np.arange(n - c, n) for c, n in zip(counts, lens)]).astype(np.int32)
    seq = np.repeat(np.arange(len(counts)), counts)
    slots = tables[seq, positions // block_tokens] * block_tokens + positions % block_tokens
    wanted = np.asarray(starts[1:] - 1 if rows is None else rows, np.int32)
    return StepBatch(tokens.astype(np.int32), positions, slots.astype(np.int32)[None], starts, np.asarray(lens, np.int32),
                     np.ascontiguousarray(tables[None], np.int32), wanted)
