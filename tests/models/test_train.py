"""The demo's training script: windows, the space-splitting trick, and a run that repeats bit for bit."""

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tokenizers import Tokenizer  # noqa: E402
from transformers import LlamaForCausalLM  # noqa: E402

import inferloom.models.demo as demo  # noqa: E402
from inferloom.models.demo.corpus import BOS_ID, EOS_ID, SourceFile  # noqa: E402
from inferloom.models.demo.train import Options, Windows, fit, model_config, split_spaces, window_loss  # noqa: E402

SOURCE = "".join(f"def function_{i}(self, name):\n    return self.value + {i}\n\n\n" for i in range(400))
FILES = (SourceFile("a.py", SOURCE), SourceFile("b.py", SOURCE))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(Path(demo.__file__).resolve().parent / "tokenizer.json"))


def test_split_spaces_changes_tokens_but_not_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(SOURCE, add_special_tokens=False).ids
    split = split_spaces(tokenizer, ids, seed=1)
    assert len(split) > len(ids)
    assert tokenizer.decode(split) == SOURCE
    assert split == split_spaces(tokenizer, ids, seed=1) != split_spaces(tokenizer, ids, seed=2)


def test_windows_begin_with_bos_and_predict_the_next_token(tokenizer: Tokenizer) -> None:
    windows = Windows(tokenizer, FILES, seed=0)
    assert (windows.stream == EOS_ID).sum() == len(FILES)
    inputs, targets = windows.draw(7, 8, 32)
    assert inputs.shape == targets.shape == (8, 32)
    assert (inputs[:, 0] == BOS_ID).all()
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    for row in targets[4:]:
        assert tokenizer.decode(row.tolist()).lstrip("\n").startswith("def function_")
    assert torch.equal(windows.draw(7, 8, 32)[1], targets)
    assert not torch.equal(windows.draw(8, 8, 32)[1], targets)


def test_steps_repeat_bit_for_bit_and_learn(tokenizer: Tokenizer) -> None:
    config = model_config()
    config.num_hidden_layers, config.hidden_size, config.intermediate_size = 1, 64, 128
    windows = Windows(tokenizer, FILES, seed=0)
    losses = []
    for _ in range(2):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).float()
        assert fit(model, windows, Options(out=Path("unused"), steps=6, batch_tokens=512)) == 6
        losses.append({name: value.clone() for name, value in model.state_dict().items()})
    assert all(torch.equal(value, losses[1][name]) for name, value in losses[0].items())
    torch.manual_seed(0)
    fresh = LlamaForCausalLM(config).float()
    inputs, targets = windows.draw(99, 4, 64)
    with torch.no_grad():
        before, after = (window_loss(m, inputs, targets, "mean").item() for m in (fresh, model))
    assert after < before - 0.01
