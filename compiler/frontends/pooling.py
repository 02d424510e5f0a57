"""How a checkpoint's hidden states become one vector, as its author says.

sentence-transformers keeps that beside the weights: `modules.json` lists what follows the model, in order, and
`1_Pooling/config.json` says how tokens are pooled (https://www.sbert.net/docs/package_reference/sentence_transformer/models.html).
GGUF files have `pooling_type` among their metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inferloom.ir.errors import UnsupportedError
from inferloom.runtime.manifest import POOLINGS, Pooling

MODULES = "modules.json"
#: sentence-transformers' words, and the numbers of GGUF.
_NAMES = {"lasttoken": "last", "mean_tokens": "mean", "mean": "mean", "cls_token": "cls", "cls": "cls"}
_GGUF = {0: "none", 1: "mean", 2: "cls", 3: "last", 4: "rank"}


@dataclass(frozen=True, slots=True)
class CheckpointPooling:
    """`pooling` is "last", "mean", or another one's name, which `check_pooling` refuses; `where` it stands, for messages."""

    pooling: str
    normalize: bool
    where: str


def read_pooling(folder: Path) -> CheckpointPooling | None:
    """What a folder says, None if nothing. UnsupportedError for a module that is neither of the model, pooling or length."""
    if not (folder / MODULES).is_file():
        return None
    modules, pooling, normalize = _json(folder / MODULES), None, False
    if not isinstance(modules, list) or not all(isinstance(m, dict) for m in modules):
        raise UnsupportedError(f"{folder / MODULES} is not a list of modules")
    for module in modules:
        kind, path = str(module.get("type", "")).rpartition(".")[2], str(module.get("path", ""))
        if kind == "Pooling":
            if Path(path).name != path or path in ("", ".."):
                raise UnsupportedError(f"{folder / MODULES}: the path of a module is a folder beside it, not {path!r}")
            pooling = folder / path / "config.json"
        elif kind == "Normalize":
            normalize = True
        elif kind != "Transformer":
            raise UnsupportedError(f"{folder / MODULES}: after the model comes {module.get('type')}, and embeddings are only "
                                   "pooled and normalised: take it out there if you want them without it")
    if pooling is None:
        return None
    return CheckpointPooling(_mode(_json(pooling), pooling), normalize, str(pooling))


def gguf_pooling(metadata: Mapping[str, Any], where: str) -> CheckpointPooling | None:
    """What the metadata of a GGUF file say. Vectors have length 1, as llama.cpp makes them by default."""
    number = metadata.get(f"{metadata.get('general.architecture')}.pooling_type")
    return None if number is None or _GGUF.get(number) == "none" else CheckpointPooling(
        _GGUF.get(number, f"number {number}"), True, where)


def check_pooling(found: CheckpointPooling | None, pooling: str | None, normalize: bool | None) -> tuple[Pooling, bool]:
    """How vectors are made: as the options say, else as the checkpoint does, else from the last token, of length 1.

    UnsupportedError for what cannot be done.
    """
    wanted = pooling or (found.pooling if found is not None else "last")
    if wanted not in POOLINGS:
        where = "" if pooling or found is None else f"{found.where}: "
        why = ": the first token of a causal model sees no other, and its state says nothing of a text" if wanted == "cls" else ""
        raise UnsupportedError(f"{where}pooling {wanted!r} is not supported{why}; choose --pooling {' or '.join(POOLINGS)}")
    unit = normalize if normalize is not None else found.normalize if found is not None else True
    return wanted, unit  # type: ignore[return-value]


def _mode(config: Any, where: Path) -> str:
    """The one pooling that is switched on. Old files have a key for each, new ones have its name."""
    if not isinstance(config, dict):
        raise UnsupportedError(f"{where} does not say how tokens are pooled")
    modes = config.get("pooling_mode")
    if modes is None:
        modes = [name.removeprefix("pooling_mode_") for name, on in config.items() if name.startswith("pooling_mode_") and on]
    modes = [modes] if isinstance(modes, str) else modes
    if not isinstance(modes, list) or len(modes) != 1:
        return " and ".join(map(str, modes)) if isinstance(modes, list) and modes else "none"
    return _NAMES.get(str(modes[0]), str(modes[0]))


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UnsupportedError(f"{file} cannot be read: {error}") from None
