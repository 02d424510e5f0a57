"""What a step must read and compute at least, from the artifact alone."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ITEMSIZE = {"F32": 4, "BF16": 2, "F16": 2, "U8": 1, "I8": 1}


@dataclass(frozen=True, slots=True)
class Cost:
    """`bytes`: weights that a step reads whole. FLOPs: for each token, and for each row of logits.

    `experts`: bytes, experts and choices of a token, of the linear layers by expert.
    """

    bytes: int
    flops_per_token: int
    flops_per_row: int
    experts: tuple[tuple[int, int, int], ...] = ()

    def bytes_of(self, tokens: int) -> float:
        """Weights that a step of so many tokens reads, if they choose their experts independently and evenly."""
        return self.bytes + sum(size * (1 - (1 - choices / count) ** tokens) for size, count, choices in self.experts)


def step_cost(artifact: Path) -> Cost:
    """Adds up the weights of matmul kernels, and of experts that are chosen.

    Embeddings are gathered row by row and count as nothing.
    """
    manifest = json.loads((artifact / "manifest.json").read_text())
    tensors = _tensors(artifact / manifest["weights"]["file"])
    itemsize = {"fp32": 4, "bf16": 2}[manifest["model"]["dtype"]]
    read: dict[int, int] = {}
    experts: dict[int, tuple[int, int, int]] = {}
    per_token = per_row = 0
    last = max(i for i, call in enumerate(manifest["plan"]) if _writes(call, manifest["output"]["offset"])
               and manifest["kernels"][call["kernel"]]["kind"] != "sampling")
    for number, call in enumerate(manifest["plan"]):
        kernel: dict[str, Any] = manifest["kernels"][call["kernel"]]
        if kernel["kind"] not in ("matmul", "experts"):
            continue
        offsets = {arg["offset"] for arg in call["args"] if arg["space"] == "weights"}
        sizes = {offset: tensors[offset] for offset in offsets if offset in tensors}
        if kernel["kind"] == "experts":
            count, choices = kernel["resources"]["experts"], kernel["resources"]["choices"]
            largest = max(sizes, key=lambda offset: sizes[offset])  # the other is a bias
            experts[largest] = sizes[largest], count, choices
            per_token += 2 * sizes[largest] // itemsize * choices // count
            continue
        read |= sizes
        flops = 2 * sum(size // itemsize for size in sizes.values())
        if number == last:
            per_row += flops
        else:
            per_token += flops
    return Cost(sum(read.values()), per_token, per_row, tuple(experts.values()))


def _writes(call: dict[str, Any], offset: int) -> bool:
    """Whether an operand or result of `call` lies where the logits do; the last such call makes the logits."""
    return any(arg["space"] == "workspace" and arg["offset"] == offset for arg in call["args"])


def _tensors(file: Path) -> dict[int, int]:
    """Bytes of each tensor by its offset in the data section."""
    with open(file, "rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    return {entry["data_offsets"][0]: entry["data_offsets"][1] - entry["data_offsets"][0]
            for name, entry in header.items() if name != "__metadata__"}
