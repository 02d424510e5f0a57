"""An engine that computes something else is found out; one that rounds is not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from inferloom.benchmarks.cpu import checkpoints
from inferloom.benchmarks.cpu.score import Reference, score
from tests import zoo

PROMPTS = [tuple(range(3, 23)), tuple(range(40, 20, -1))]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("score") / "model"
    zoo.build("llama").save_pretrained(folder)
    return folder


def line(kind: str, made: list[list[object]], precision: str = "bf16") -> dict[str, object]:
    return {"kind": kind, "precision": precision, "lines": [{"metric": "rss"}, {"metric": "decode_1", "made": made}]}


def test_places(checkpoint: Path) -> None:
    """Greedy tokens are at 0, and scores of continuations do not disturb each other."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    reference = Reference(checkpoint, 1)
    greedy = []
    for prompt in PROMPTS:
        ids = list(prompt)
        for _ in range(4):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        greedy.append(tuple(ids[len(prompt):]))
    for _ in range(2):
        for prompt, new in zip(PROMPTS, greedy):
            assert reference.places(prompt, new) == pytest.approx([0] * 4, abs=1e-4)
            other = (new[0], (new[1] + 7) % 131, *new[2:])
            placed = reference.places(prompt, other)
            logits = model(torch.tensor([[*prompt, new[0]]])).logits[0, -1].detach()
            assert placed[0] == pytest.approx(0, abs=1e-4)
            assert placed[1] == pytest.approx(float((logits.max() - logits[other[1]]) / (logits.max() - logits.mean())), rel=1e-3)


def test_nonsense_is_not_sane(checkpoint: Path) -> None:
    reference = Reference(checkpoint, 1)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    right = [[list(p), [int(model(torch.tensor([p])).logits[0, -1].argmax())]] for p in PROMPTS]
    wrong = [[list(p), [5, 6, 7, 8]] for p in PROMPTS]
    made = score([line("right", right), line("wrong", wrong), {"kind": "absent", "precision": "bf16", "missing": "x"}], reference)
    assert made["right"] == {"mean": pytest.approx(0, abs=1e-4), "largest": pytest.approx(0, abs=1e-4), "tokens": 2, "sane": True}
    assert not made["wrong"]["sane"] and made["wrong"]["tokens"] == 8 and set(made) == {"right", "wrong"}


def test_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made once; the tokenizer covers the vocabulary; operations are those of the linear layers."""
    small = checkpoints.Shape("small", "LlamaConfig", {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
        "intermediate_size": 48, "vocab_size": 700, "max_position_embeddings": 64})
    monkeypatch.setitem(checkpoints.SHAPES, "small", small)
    monkeypatch.setattr(checkpoints, "TRAINED", 600)
    monkeypatch.setattr(checkpoints.sysconfig, "get_paths", lambda: {"stdlib": str(Path(checkpoints.__file__).parent)})
    folder = checkpoints.make("small", tmp_path)
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert checkpoints.make("small", tmp_path) == folder and (folder / "model.safetensors").stat().st_mtime_ns == stamp
    layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48
    assert checkpoints.operations(folder) == (2 * 2 * layer, 2 * 700 * 32)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 700 and tokenizer.decode(tokenizer.encode("def f(x):").ids) == "def f(x):"
    weights = AutoModelForCausalLM.from_pretrained(folder).model.norm.weight
    assert float((weights.float() - 1).abs().mean()) > 0.01
