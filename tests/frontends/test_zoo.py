"""Every architecture of the zoo computes, as an imported graph, what transformers computes eagerly."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from inferloom.compiler.frontends import huggingface
from inferloom.ir.interpret import interpret
from inferloom.ir.ops.recurrent import STATE_OF
from inferloom.ir.verify import verify
from tests import zoo

QUICK = {"llama", "qwen2_window", "gemma2", "gpt2", "bloom", "falcon_alibi"}
LENGTHS = (1, 5, 23)


def eager(model, tokens: np.ndarray) -> np.ndarray:
    """Logits [tokens, vocab] of transformers' own attention."""
    if model.config.model_type == "falcon":
        model.config._attn_implementation = "sdpa"  # its eager attention adds the ALiBi bias twice
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(tokens)[None].long(), use_cache=False).logits[0].numpy()


def run_graph(imported, model, tokens: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Logits [rows, vocab] of the NumPy interpreter."""
    state = {n: p.detach().numpy() for n, p in model.named_parameters(remove_duplicate=False)}
    params = {p.source: imported.buffers[p.source] if p.source in imported.buffers else state[p.source]
              for p in imported.graph.params}
    inputs = {"tokens": tokens, "positions": np.arange(len(tokens), dtype=np.int32), "logit_rows": rows}
    (logits,) = interpret(imported.graph, inputs, params)
    return logits


def check(imported, model, limit: float = 1e-4) -> float:
    """The largest error over all lengths, in standard deviations of the logits."""
    worst = 0.0
    for length in LENGTHS:
        tokens = np.random.default_rng(length).integers(3, 131, length).astype(np.int32)
        want = eager(model, tokens)
        rows = np.array([length - 1, 0, length // 2], np.int32)
        got = run_graph(imported, model, tokens, rows)
        worst = max(worst, float(np.abs(got - want[rows]).max() / want.std()))
    assert worst <= limit
    return worst


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in zoo.ZOO])
def test_graph_matches_transformers(name: str) -> None:
    torch.set_num_threads(1)
    traced, _ = huggingface.trace_config(zoo.config(name))
    imported = traced.imported
    verify(imported.graph, "model")
    assert all(n.loc for n in imported.graph.nodes if n.op != "constant")
    slots = [n.attrs["slot"] for n in imported.graph.nodes if n.op in ("attention", *STATE_OF)]
    assert slots == list(range(len(slots))) and slots
    check(imported, zoo.build(name))


@pytest.mark.parametrize(("name", "change"), [
    ("qwen2_window", {"window": 0}), ("gemma2", {"softcap": 0.0}), ("llama", {"scale": 0.2625})])
def test_the_comparison_sees_errors(name: str, change: dict) -> None:
    """Negative control: without the window, without the soft-cap or with 5% more scale, the logits differ."""
    from inferloom.compiler.frontends.aten import Imported
    from inferloom.ir.graph import rewrite

    traced, _ = huggingface.trace_config(zoo.config(name))

    def spoil(builder, node, operands):
        if node.op != "attention":
            return None
        return builder.emit_node(node.op, operands, dict(node.attrs) | change, node.loc).results

    spoilt = Imported(rewrite(traced.imported.graph, spoil), traced.imported.buffers, {})
    with pytest.raises(AssertionError):
        check(spoilt, zoo.build(name))
