"""Our engine as the benchmark runs it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from inferloom.benchmarks.cpu.engines import ours
from inferloom.benchmarks.cpu.engines.ours import Engine


def test_generate(tiny_artifact: Path) -> None:
    engine = Engine(str(tiny_artifact), 1, {})
    made = engine.generate([[5, 6, 7], [8, 9, 10]], 4)
    assert [len(ids) for ids in made] == [4, 4] and engine.contract["weights"] > 0
    assert made[1] == engine.generate([[8, 9, 10]], 4)[0]


def test_decode_at(tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sequence is given blocks of its own, full of what a prompt left there, and steps at the end of its context."""
    monkeypatch.setattr(ours, "SEED_BLOCKS", 2)
    monkeypatch.setattr(ours, "FIRST_TOKEN", 3)
    engine = Engine(str(tiny_artifact), 1, {})
    size, steps = engine.llm.manifest.state.block_tokens, []
    step = engine.llm.device.step
    monkeypatch.setattr(engine.llm.device, "step", lambda batch: (steps.append(batch), step(batch))[1])
    assert engine.decode_at(4 * size, 2, 3) > 0
    assert steps[0].seq_starts.tolist() == [0, 2 * size] and len(steps) == 2 + 3
    last = steps[-1]
    assert last.positions.tolist() == [4 * size + 2] * 2 and last.kv_lens.tolist() == [4 * size + 3] * 2
    assert np.unique(last.block_tables).size == last.block_tables.size == 10
    assert last.slots.tolist() == [[4 * size + 2, 9 * size + 2]]
    blocks = [engine.llm.device.read_block(block) for block in range(4)]
    assert blocks[0] == blocks[2] != blocks[1] == blocks[3] and any(blocks[0])
    with pytest.raises(RuntimeError, match="need one group of keys and values"):
        engine.decode_at(engine.llm.device.num_blocks * size, 2, 3)
