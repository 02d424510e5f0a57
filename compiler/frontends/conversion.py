"""Parameters that a checkpoint stores in other pieces: per expert, or gate and up apart.

transformers declares how pieces become parameters (`conversion_mapping`); its own operations are applied here, to the
pieces of one parameter at a time, when that is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import torch

from inferloom.compiler.frontends.weights import Tensor, legacy_name
from inferloom.ir.errors import UnsupportedError

_TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


@dataclass(frozen=True, slots=True)
class Converted:
    """A parameter made of pieces of a checkpoint, by the converter's source pattern."""

    name: str
    pieces: Mapping[str, tuple[Tensor, ...]]
    converter: Any
    model: Any

    @property
    def dtype(self) -> str:
        """The element type of the pieces; "mixed" when they differ."""
        kinds = {t.dtype for tensors in self.pieces.values() for t in tensors}
        return kinds.pop() if len(kinds) == 1 else "mixed"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._convert(lambda t: torch.empty(t.shape, dtype=_TORCH.get(t.dtype, torch.float32), device="meta")).shape)

    def read(self) -> np.ndarray:
        made = self._convert(lambda t: _tensor(t.read())).contiguous()
        return made.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if made.dtype is torch.bfloat16 else made.numpy()

    def _convert(self, load: Callable[[Tensor], torch.Tensor]) -> torch.Tensor:
        made: dict[str, Any] = {pattern: [load(t) for t in tensors] for pattern, tensors in self.pieces.items()}
        for operation in self.converter.operations:
            made = operation.convert(made, source_patterns=self.converter.source_patterns,
                                     target_patterns=self.converter.target_patterns, full_layer_name=self.name,
                                     model=self.model, config=self.model.config, missing_keys=None)
        found = [tensor for target, tensor in made.items() if target in self.name]
        if len(found) != 1:
            raise UnsupportedError(f"{self.name}: transformers' conversion makes {', '.join(made)} of its pieces")
        return found[0][0] if isinstance(found[0], list) else found[0]


def _tensor(array: np.ndarray) -> torch.Tensor:
    array = np.array(array)  # mapped files are read-only
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16) if array.dtype == ml_dtypes.bfloat16 else \
        torch.from_numpy(array)


def named(model: Any, stored: Mapping[str, Tensor]) -> dict[str, Tensor | Converted]:
    """What a checkpoint holds by the names of parameters, as transformers' own loader maps and converts them."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    mapping = get_model_conversion_mapping(model, add_legacy=False)
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    expected = model.state_dict(keep_vars=True)
    made: dict[str, Tensor | Converted] = {}
    pieces: dict[str, dict[str, list[Tensor]]] = {}
    for key in sorted(stored, key=dot_natural_key):
        name, pattern = rename_source_key(legacy_name(key), renamings, converters, model.base_model_prefix, expected)
        if name not in expected and key in expected:
            name, pattern = key, None
        if pattern is None:
            made[name] = stored[key]
        else:
            pieces.setdefault(name, {}).setdefault(pattern, []).append(stored[key])
    for name, parts in pieces.items():
        converter = next(c for c in converters if set(parts) <= set(c.source_patterns))
        frozen = {pattern: tuple(tensors) for pattern, tensors in parts.items()}
        first = converter.target_patterns[0]
        for target in converter.target_patterns:
            whole = name.replace(first, target)
            made[whole] = Converted(whole, frozen, converter, model)
    return made
