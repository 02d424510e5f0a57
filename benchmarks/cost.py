"""What a step must read and compute at least, from the artifact alone."""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inferloom.errors import InferloomError


@dataclass(frozen=True, slots=True)
class Cost:
    """`bytes`: weights, with their scales, that a step reads whole. FLOPs: for each token, and for each row of logits, by
    the arithmetic of their products (int8, bf16, fp32).

    `experts`: bytes, experts and choices of a token, of the linear layers by expert.
    """

    bytes: int
    token_flops: Mapping[str, int]
    row_flops: Mapping[str, int]
    experts: tuple[tuple[int, int, int], ...] = ()

    @property
    def flops_per_token(self) -> int:
        return sum(self.token_flops.values())

    @property
    def flops_per_row(self) -> int:
        return sum(self.row_flops.values())

    def seconds(self, tokens: int, rows: int, peaks: Mapping[str, float]) -> float:
        """What computing takes at least, with `peaks` in GFLOP/s; without a peak of its own, arithmetic has that of fp32."""
        return sum(count * flops / (peaks.get(name, peaks["fp32"]) * 1e9)
                   for count, each in ((tokens, self.token_flops), (rows, self.row_flops)) for name, flops in each.items())

    def bytes_of(self, tokens: int) -> float:
        """Weights that a step of so many tokens reads, if they choose their experts independently and evenly."""
        return self.bytes + sum(size * (1 - (1 - choices / count) ** tokens) for size, count, choices in self.experts)


def step_cost(artifact: Path) -> Cost:
    """Adds up the weights of matmul kernels, and of experts that are chosen.

    Embeddings are gathered row by row and count as nothing. InferloomError for an artifact whose kernels do not say what
    they multiply: one for a GPU, or of an earlier version.
    """
    manifest = json.loads((artifact / "manifest.json").read_text())
    tensors = _tensors(artifact / manifest["weights"]["file"])
    read: dict[int, int] = {}
    experts: dict[int, tuple[int, int, int]] = {}
    per_token, per_row = Counter[str](), Counter[str]()
    last = max(i for i, call in enumerate(manifest["plan"]) if _writes(call, manifest["output"]["offset"])
               and manifest["kernels"][call["kernel"]]["kind"] != "sampling")
    for number, call in enumerate(manifest["plan"]):
        kernel: dict[str, Any] = manifest["kernels"][call["kernel"]]
        if kernel["kind"] not in ("matmul", "experts"):
            continue
        facts = kernel["resources"]
        if "products" not in facts:
            raise InferloomError(f"{artifact}: its kernels do not say what they multiply; compile it again, for a CPU")
        sizes = {arg["offset"]: tensors[arg["offset"]] for arg in call["args"] if arg["space"] == "weights"}
        flops = 2 * facts["n"] * facts["k"]
        if kernel["kind"] == "experts":
            largest = max(sizes, key=lambda offset: sizes[offset])  # the others are scales, or a bias
            experts[largest] = sum(sizes.values()), facts["experts"], facts["choices"]
            per_token[facts["products"]] += flops * facts["choices"]
            continue
        read |= sizes
        (per_row if number == last else per_token)[facts["products"]] += flops
    return Cost(sum(read.values()), dict(per_token), dict(per_row), tuple(experts.values()))


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
