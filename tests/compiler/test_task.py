"""To embed, a graph ends at the final hidden states."""

from __future__ import annotations

import doctest
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import inferloom
from inferloom.compiler import task
from inferloom.compiler.frontends import huggingface
from inferloom.compiler.frontends.aten import Imported
from inferloom.compiler.frontends.module import trace_module
from inferloom.compiler.task import for_task
from inferloom.errors import UsageError
from inferloom.ir.errors import UnsupportedError
from inferloom.ir.text import parse_graph
from inferloom.ir.verify import verify
from tests import zoo
from tests.frontends.test_zoo import run_graph

MORE = ("gemma2", "gpt2", "roberta", "bart", "granite", "cohere", "opt_projected", "mamba", "rwkv", "jamba",
        "mixtral", "phi", "gptj")


def test_the_example_holds() -> None:
    assert doctest.testmod(task).attempted > 0 == doctest.testmod(task).failed


@pytest.mark.parametrize("name", ["llama", *(pytest.param(n, marks=pytest.mark.slow) for n in MORE)])
def test_hidden_states_are_transformers(name: str) -> None:
    torch.set_num_threads(1)
    traced, _ = huggingface.trace_config(zoo.config(name))
    graph = for_task(traced.imported.graph, "embed")
    verify(graph, "model")
    assert len(graph.params) < len(traced.imported.graph.params) or zoo.config(name).tie_word_embeddings
    model = zoo.build(name)
    tokens = np.random.default_rng(0).integers(3, 131, 23).astype(np.int32)
    base = getattr(model, model.base_model_prefix)
    with torch.no_grad():
        want = base(input_ids=torch.from_numpy(tokens)[None].long(), use_cache=False).last_hidden_state[0].numpy()
    rows = np.array([22, 0, 11], np.int32)
    got = run_graph(Imported(graph, traced.imported.buffers, {}), model, tokens, rows)
    assert np.abs(got - want[rows]).max() <= 1e-4 * want.std()


class Capped(nn.Module):
    """Logits with a soft-cap, of which rows are picked at the very end."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(17, 8), nn.LayerNorm(8), nn.Linear(8, 17)

    def forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return 30 * torch.tanh(self.head(self.norm(self.embed(ids))) / 30)


def test_rows_are_picked_of_what_the_head_reads() -> None:
    module = Capped()
    traced = trace_module(module, vocab_size=17, max_model_len=32)
    graph = for_task(traced.graph, "embed")
    assert {p.source for p in graph.params} == {"embed.weight", "norm.weight", "norm.bias"}
    assert for_task(traced.graph, "generate") is traced.graph
    tokens, rows = np.array([3, 1, 4, 1, 5], np.int32), np.array([4, 0], np.int32)
    with torch.no_grad():
        want = module.norm(module.embed(torch.from_numpy(tokens).long())).numpy()[rows]
    assert np.allclose(run_graph(Imported(graph, {}, {}), module, tokens, rows), want, atol=1e-5)


def test_a_graph_without_a_head_is_refused() -> None:
    """The last linear layer of a model that gives hidden states is no head: a residual comes after it."""
    graph = parse_graph('''graph g (tokens<=8, rows<=8) {
      input %x: f32[tokens,4]
      input %logit_rows: i32[rows]
      param %w: f32[4,4] = "w"
      %a = linear %x, %w, _
      %b = add %x, %a
      %c = mul %b, %a
      %y = gather_rows %c, %logit_rows
      return %y
    }''')
    with pytest.raises(UnsupportedError, match="does not end in a linear layer"):
        for_task(graph, "embed")
    with pytest.raises(UnsupportedError, match="does not end in a linear layer"):
        for_task(replace(graph, outputs=(graph.inputs[0],)), "embed")


def test_an_unknown_task_is_refused(tiny_checkpoint, tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UnsupportedError, match="choose from: generate, embed"):
        inferloom.compile(tiny_checkpoint, out=tmp_path / "x", task="classify")
    from inferloom.cli.options import compile_options

    with pytest.raises(UsageError, match="choose one of generate, embed"):
        compile_options("cpu", "fp32", None, task="classify")
