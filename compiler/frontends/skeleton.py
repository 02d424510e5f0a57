"""Models without weights: parameters have shapes but no storage, buffers have their true values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from inferloom.ir.errors import UnsupportedError

Stored = Callable[[Any], Mapping[str, np.ndarray]]


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
        with torch.device("meta"):
            model = cls(config)
        model.eval()
        model.tie_weights()
        restore_buffers(model, stored(model) if stored else {})
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


def restore_buffers(model: Any, stored: Mapping[str, np.ndarray]) -> None:
    """Give buffers that live on the meta device their values: the stored ones, else those of initialisation."""
    lost: list[tuple[str, nn.Module, str]] = []
    for path, module in model.named_modules():
        mine = [n for n, b in module._buffers.items() if b is not None and b.is_meta]
        for name in mine:
            old = module._buffers[name]
            fill = float("nan") if old.dtype.is_floating_point else -(2**30) if old.dtype != torch.bool else False
            module._buffers[name] = torch.full(old.shape, fill, dtype=old.dtype)
            lost.append((f"{path}.{name}".lstrip("."), module, name))
    for module in dict.fromkeys(m for _, m, _ in lost):
        with torch.no_grad():
            model._init_weights(module)
    for path, module, name in lost:
        buffer = module._buffers[name]
        if path in stored:
            if stored[path].shape != tuple(buffer.shape):
                raise UnsupportedError(f"buffer {path} is {list(stored[path].shape)} in the checkpoint, expected "
                                       f"{list(buffer.shape)}")
            module._buffers[name] = torch.from_numpy(np.array(stored[path], np.float64)).to(buffer.dtype)
            continue
        bad = buffer.isnan().any() if buffer.dtype.is_floating_point else (buffer == -(2**30)).any()
        if buffer.dtype != torch.bool and bool(bad):
            raise UnsupportedError(f"buffer {path} is not set by the model's initialisation; its values are unknown")


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
