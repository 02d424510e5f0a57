"""The demo checkpoint that ships: complete, small, pickle-free, loadable, and really trained."""

import json
import struct
import sysconfig
from pathlib import Path

import pytest

import inferloom.models.demo as demo

FOLDER = Path(demo.__file__).resolve().parent
FILES = ("README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json")
MAX_BYTES = 20 * 1000 * 1000


def read_json(name: str) -> dict:
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


def safetensors_header() -> dict:
    with (FOLDER / "model.safetensors").open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(length))


def expected_shapes() -> dict[str, list[int]]:
    """Names and shapes that the config implies; tied embeddings are stored once."""
    config = read_json("config.json")
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes = {"model.embed_tokens.weight": [config["vocab_size"], hidden], "model.norm.weight": [hidden]}
    for layer in range(config["num_hidden_layers"]):
        shapes |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": [hidden],
                "post_attention_layernorm": [hidden],
                "self_attn.q_proj": [queries, hidden],
                "self_attn.k_proj": [keys, hidden],
                "self_attn.v_proj": [keys, hidden],
                "self_attn.o_proj": [hidden, queries],
                "mlp.gate_proj": [inner, hidden],
                "mlp.up_proj": [inner, hidden],
                "mlp.down_proj": [hidden, inner],
            }.items()
        }
    return shapes


def test_files_exist_and_are_small() -> None:
    for name in (*FILES, "tokenizer_config.json"):
        assert (FOLDER / name).is_file(), name
    shipped = [path for path in FOLDER.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in shipped) <= MAX_BYTES
    assert not [path for path in shipped if path.suffix in {".pt", ".pth", ".bin", ".pkl", ".ckpt"}]


def test_config_is_a_llama_that_can_end() -> None:
    config, generation = read_json("config.json"), read_json("generation_config.json")
    assert config["model_type"] == "llama"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["tie_word_embeddings"] is True
    assert config["eos_token_id"] == generation["eos_token_id"] != config["bos_token_id"]


def test_safetensors_holds_exactly_the_models_tensors() -> None:
    header = safetensors_header()
    header.pop("__metadata__", None)
    assert {name: entry["shape"] for name, entry in header.items()} == expected_shapes()
    assert {entry["dtype"] for entry in header.values()} == {"BF16"}


def test_tokenizer_round_trips() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    config = read_json("config.json")
    assert tokenizer.get_vocab_size() == config["vocab_size"]
    source = (Path(sysconfig.get_path("stdlib")) / "heapq.py").read_text(encoding="utf-8")
    for text in (source, "", "def f(x):\n\treturn x\r\n", "naïve = '日本語 🐍'  \n\n\n", "\x00\x7f"):
        ids = tokenizer.encode(text).ids
        assert ids[0] == config["bos_token_id"]
        assert tokenizer.decode(ids) == text
    assert len(source) / len(tokenizer.encode(source).ids) > 2.5  # it learned words, not only bytes


def test_auto_tokenizer_agrees_with_tokenizer_json() -> None:
    pytest.importorskip("transformers")
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    auto = AutoTokenizer.from_pretrained(FOLDER)
    text = "class A:\n    def f(self):\n        return None\n"
    assert auto(text)["input_ids"] == Tokenizer.from_file(str(FOLDER / "tokenizer.json")).encode(text).ids
    assert auto.eos_token_id == read_json("config.json")["eos_token_id"]


def test_held_out_score_and_sample() -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM

    from inferloom.models.demo.corpus import SourceFile, load_corpus
    from inferloom.models.demo.report import complete
    from inferloom.models.demo.train import evaluate

    held_out = load_corpus().held_out
    assert all(file.held_out for file in held_out)
    longest = sorted(held_out, key=lambda file: len(file.text))[-3:]
    sample = tuple(SourceFile(file.path, file.text[6000:9000]) for file in longest)
    score = evaluate(
        LlamaForCausalLM.from_pretrained(FOLDER), Tokenizer.from_file(str(FOLDER / "tokenizer.json")), sample
    )
    assert 0.5 < score.bits_per_byte < 2.0  # untrained: about 3.5; below 0.5 it has seen the files
    assert score.perplexity < 50
    assert "import " in complete(FOLDER, "import os\n", 16).removeprefix("import os\n")


def test_split_depends_on_the_path_alone(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    from inferloom.models.demo.corpus import SourceFile, load_corpus

    assert SourceFile("ast.py", "").held_out
    assert not SourceFile("heapq.py", "").held_out
    for name in ("ast.py", "heapq.py", "test/heapq.py", "site-packages/heapq.py", "encodings/cp1252.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    corpus = load_corpus(tmp_path)
    assert [file.path for file in corpus.train] == ["heapq.py"]
    assert [file.path for file in corpus.held_out] == ["ast.py"]
    (tmp_path / "ast.py").write_text("\n")
    with pytest.raises(FileNotFoundError, match="too few"):
        load_corpus(tmp_path)


def test_schedule_rises_and_ends_at_zero() -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from inferloom.models.demo.train import learning_rate

    rates = [learning_rate(step, step / 1000) for step in range(1001)]
    peak = rates.index(max(rates))
    assert 0 < rates[0] < 0.1 and 0.9 < rates[peak] <= 1
    assert rates == sorted(rates[:peak]) + sorted(rates[peak:], reverse=True)
    assert rates[-1] == pytest.approx(0)


@pytest.mark.parametrize("bad", [["--minutes", "0"], ["--steps", "-1"], ["--threads", "0"], ["--batch-tokens", "8"]])
def test_bad_arguments_are_refused(bad: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from inferloom.models.demo.train import parse

    with pytest.raises(SystemExit):
        parse(["--out", "unused", *bad])
    assert "must be" in capsys.readouterr().err
