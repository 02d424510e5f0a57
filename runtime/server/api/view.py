"""`/v1/engine`: what the engines are doing now."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from inferloom.runtime.server.model import Model, Models
from inferloom.runtime.server.wire import Beat, Tier

_NOTHING = Beat(0.0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)


class View:
    """Shows every engine as its last sign of life told it."""

    def __init__(self, models: Models) -> None:
        self._models = models

    async def __call__(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [view(model) for model in self._models.all]},
                            headers={"cache-control": "no-store"})


def view(model: Model) -> dict[str, Any]:
    """A model's engine. Counts are since it started, and 0 while it does not run.

    `time`: seconds on the server's clock when they were taken.
    """
    engine, m = model.engine, model.manifest
    beat, seqs = engine.beat or _NOTHING, 0 if engine.ready is None else engine.ready.seqs
    return {
        "object": "engine", "name": model.name, "names": list(model.names), "state": engine.state, "time": engine.beaten,
        "restarts": engine.deaths, "architecture": m.model.architecture, "dtype": m.model.dtype, "chip": m.chip.name,
        "chat_template": model.template is not None, "max_model_len": model.longest, "max_num_seqs": seqs,
        "running": beat.running, "waiting": beat.waiting, "steps": beat.steps, "preemptions": beat.preemptions,
        "batch": {"sequences": beat.batch_sequences, "tokens": beat.batch_tokens},
        "tokens": {"prompt": beat.tokens_prompt, "generated": beat.tokens_generated},
        "blocks": {"total": beat.blocks, **beat.owners(), "tokens": m.state.block_tokens, "bytes": m.state.bytes_per_block},
        "tiers": {name: _tier(tier) for name, tier in zip(("ram", "disk"), beat.tiers, strict=True)},
        "prefix_cache": {"enabled": engine.model.enable_prefix_caching, "queries": beat.prefix_queries,
                         "hits": beat.prefix_hits}}


def _tier(tier: Tier) -> dict[str, int]:
    return {"bytes": tier.bytes, "capacity": tier.capacity}
