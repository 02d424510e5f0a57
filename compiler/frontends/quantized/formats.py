"""Which decoder reads a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from inferloom.compiler.frontends.quantized import awq, compressed_tensors, fp8, gptq
from inferloom.compiler.frontends.weights import Tensor
from inferloom.ir.errors import UnsupportedError

Decoder = Callable[[Mapping[str, Any], Mapping[str, Tensor]], tuple[dict[str, Tensor], tuple[str, ...]]]
DECODERS: dict[str, Decoder] = {"gptq": gptq.decode, "awq": awq.decode, "compressed-tensors": compressed_tensors.decode,
                               "fp8": fp8.decode}
#: A quantisation config in a file of its own (AutoGPTQ).
BESIDE = "quantize_config.json"


def decode(config: Mapping[str, Any], stored: Mapping[str, Tensor],
           where: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """What a checkpoint holds with its quantised weights decoded, by the names of the weights, and notes for the user.

    `config` is its `quantization_config`. UnsupportedError for a method that is not known or tensors that do not fit.
    """
    method = str(config.get("quant_method", "")).lower()
    if method not in DECODERS:
        raise UnsupportedError(f"{where}: weights quantised by {method or 'an unnamed method'!r} are not read; these are: "
                               f"{', '.join(DECODERS)}, and GGUF files. Use the original weights, with --quant")
    try:
        return DECODERS[method](config, stored)
    except UnsupportedError as error:
        raise UnsupportedError(f"{where}: {error}") from None
    except (AttributeError, TypeError, ValueError) as error:
        raise UnsupportedError(f"{where}: quantization_config is damaged: {error!r}") from None


def config_beside(folder: Path) -> dict[str, Any] | None:
    """The quantisation config that AutoGPTQ writes beside config.json, if there is one."""
    path = folder / BESIDE
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UnsupportedError(f"{path} is damaged: {error}") from None
    if not isinstance(found, dict):
        raise UnsupportedError(f"{path} is damaged: it holds no object")
    return {"quant_method": "gptq", **found}
