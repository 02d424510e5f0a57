"""What a checkpoint's configuration says: model type, positions, rotary embeddings, special tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from inferloom.ir.errors import UnsupportedError


def read_config(folder: Path) -> tuple[Any, dict[str, Any]]:
    """The transformers config of a folder, from `config.json` alone, and its `quantization_config` ({} if it has none).

    UnsupportedError when the config is not known.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UnsupportedError(f"{folder} has no config.json: it is not a Hugging Face checkpoint")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"), object_hook=_floats)
        raw.pop("auto_map", None)
        # transformers must not see it: it would look for the library that quantised the weights
        quantization = raw.pop("quantization_config", None) or raw.pop("compression_config", None) or {}
        if not isinstance(quantization, dict):
            raise TypeError("quantization_config is not an object")
    except (ValueError, TypeError, AttributeError) as error:
        raise UnsupportedError(f"{path} is not a config of transformers: {error!r}") from None
    return make_config(raw, str(path)), quantization


def make_config(raw: dict[str, Any], where: str) -> Any:
    """The transformers config that `raw` describes; UnsupportedError when its model type is not known."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if raw.get("model_type") not in CONFIG_MAPPING:
        raise UnsupportedError(f"{where}: transformers does not know model_type {raw.get('model_type')!r} (code in the "
                               "checkpoint is never run)")
    try:
        return CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
    except Exception as error:  # each config checks itself in ways of its own
        raise UnsupportedError(f"{where}: transformers refuses the config: {error}") from None


def _floats(value: dict[str, Any]) -> Any:
    """Transformers writes infinities and NaN, which JSON has not, as {"__float__": "Infinity"}."""
    return float(value["__float__"]) if value.keys() == {"__float__"} else value


def position_limit(config: Any) -> int | None:
    """How many positions the model was made for, or None when it has no limit (ALiBi)."""
    for name in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def model_length(config: Any, wanted: int | None) -> int:
    """`max_model_len` in tokens: as wanted, else what the model was made for (2048 where it does not say)."""
    limit = position_limit(config)
    if wanted is None:
        return limit or 2048
    if wanted < 1 or (limit is not None and wanted > limit):
        raise UnsupportedError(f"max_model_len={wanted} is not within the 1 to {limit or 'any number of'} positions of the model")
    return wanted


def fix_rope(config: Any, max_model_len: int) -> tuple[str, ...]:
    """Decide at compile time what rotary embeddings would decide per batch; returns notes on the choice.

    `longrope` (Ding et al. 2024) takes its long factors when sequences may run past the original length, its
    short ones otherwise; transformers chooses by the longest sequence of each batch. `dynamic` changes nothing
    within the positions that the model was made for, and `max_model_len` stays within them.
    """
    notes: list[str] = []
    for rope in rope_parameters(config):
        kind = rope.get("rope_type", "default")
        if kind == "dynamic":
            rope["rope_type"] = "default"
            notes.append(f"dynamic rope: as trained, for up to {position_limit(config)} tokens")
        elif kind == "longrope":
            original = rope.get("original_max_position_embeddings")
            if not isinstance(original, int):
                raise UnsupportedError("longrope without original_max_position_embeddings")
            chosen = "long_factor" if max_model_len > original else "short_factor"
            rope["short_factor"] = rope["long_factor"] = rope[chosen]
            notes.append(f"longrope: {chosen} for all sequences, since max_model_len={max_model_len} and the model's "
                         f"original length is {original}")
    return tuple(dict.fromkeys(notes))


def rope_parameters(config: Any) -> list[dict[str, Any]]:
    """The rope parameters of a config, one set or one per layer type."""
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict):
        return []
    return [r for r in rope.values() if isinstance(r, dict)] if any(
        isinstance(r, dict) for r in rope.values()) else [rope]


def special_ids(config: Any, folder: Path) -> tuple[tuple[int, ...], int | None]:
    """End and begin tokens: of generation_config.json where it names them, else of config.json."""
    path = folder / "generation_config.json"
    generation = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    eos = generation.get("eos_token_id", getattr(config, "eos_token_id", None))
    bos = generation.get("bos_token_id", getattr(config, "bos_token_id", None))
    many = eos if isinstance(eos, list) else [] if eos is None else [eos]
    return tuple(dict.fromkeys(int(e) for e in many)), None if bos is None else int(bos)
