"""Models without weights: parameters have shapes but no storage, buffers have their true values."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from inferloom.ir.errors import UnsupportedError

Stored = Callable[[Any], Mapping[str, np.ndarray]]
#: Elements of a tensor that is made without values and is too large to be a buffer.
LARGE = 2**26


def build_skeleton(config: Any, stored: Stored | None = None) -> Any:
    """The transformers causal LM of a config, in float32, for tracing; UnsupportedError when there is none.

    `stored(model)` gives the buffers that the checkpoint holds, by name.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedError(f"transformers has no causal language model for model_type {config.model_type!r}")
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError(f"{config.model_type!r} has an encoder; only decoders are supported")
    config._attn_implementation = "eager"
    cls = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if isinstance(cls, (tuple, list)):
        cls = cls[0]
    dtype = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float32)
        with parameters_on_meta():
            model = cls(config)
        model.eval()
        model.tie_weights()
        load_buffers(model, stored(model) if stored else {})
        pin_rope(model)
    finally:
        torch.set_default_dtype(dtype)
    strip_parameters(model)
    return model


def pin_rope(model: nn.Module) -> None:
    """Stop longrope modules from choosing their factors anew for each batch (`hf_config.fix_rope` has chosen)."""
    for module in model.modules():
        kind: Any = getattr(module, "rope_type", None)
        if kind == "longrope":
            module.rope_type = "default"
        elif isinstance(kind, dict):
            module.rope_type = {k: "default" if v == "longrope" else v for k, v in kind.items()}


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules made meanwhile keep their buffers and other tensors, but parameters lose their storage at once.

    What only a parameter can be is never given any: the experts of a large model are one tensor of many gigabytes.
    """
    original, empty = nn.Module.register_parameter, torch.empty

    def unallocated(*size: Any, **kwargs: Any) -> torch.Tensor:
        dims = size[0] if len(size) == 1 and isinstance(size[0], (tuple, list, torch.Size)) else size
        if "size" not in kwargs and math.prod(dims) >= LARGE:
            kwargs["device"] = "meta"
        return empty(*size, **kwargs)

    def register(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        original(self, name, parameter)

    nn.Module.register_parameter, torch.empty = register, unallocated  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter, torch.empty = original, empty  # type: ignore[method-assign]


def load_buffers(model: nn.Module, stored: Mapping[str, np.ndarray]) -> None:
    """Set the buffers that a checkpoint holds, by name; UnsupportedError when a shape differs."""
    for path, array in stored.items():
        owner, _, name = path.rpartition(".")
        module = model.get_submodule(owner)
        old = module.get_buffer(name)
        if tuple(old.shape) != array.shape:
            raise UnsupportedError(f"buffer {path} is {list(array.shape)} in the checkpoint, expected {list(old.shape)}")
        module._buffers[name] = torch.from_numpy(np.array(array, np.float64)).to(old.dtype)


def strip_parameters(model: nn.Module) -> None:
    """Replace every parameter by a fake one on the CPU: a shape without storage that mixes with real buffers."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is None:
                continue
            if id(old) not in made:
                with mode:
                    made[id(old)] = nn.Parameter(torch.empty(old.shape, dtype=torch.float32), requires_grad=False)
            module._parameters[name] = made[id(old)]
