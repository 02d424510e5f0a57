"""Checkpoints with random weights in the shapes of real models, with a tokenizer that every peer can read."""

from __future__ import annotations

import json
import math
import shutil
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Merges are trained up to this size; the rest of a vocabulary are fillers, which no text contains.
TRAINED = 30000
END, BEGIN, PAD = "<|endoftext|>", "<|bos|>", "<|pad|>"
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 8192}


@dataclass(frozen=True, slots=True)
class Shape:
    """A configuration of transformers by its class and arguments; `title` is what reports call it.

    Queries, keys and the output of attention are `sharper` times larger than transformers' initial values: as large as
    can be before rounding to 8 bits, which such random layers amplify, leaves nothing of the logits.
    """

    title: str
    kind: str
    arguments: dict[str, Any]
    sharper: float = 3.0


#: All tie the output matrix to the embedding, so that a step of decoding reads each weight once.
SHAPES = {
    "llama-100m": Shape("Llama, 100M", "LlamaConfig", {
        "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 64,
        "intermediate_size": 2048, "vocab_size": 32000, "max_position_embeddings": 16384, "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
    "qwen2.5-0.5b": Shape("Qwen2.5-0.5B", "Qwen2Config", {
        "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
        "intermediate_size": 4864, "vocab_size": 151936, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}}),
    "llama-3.2-1b": Shape("Llama-3.2-1B", "LlamaConfig", {
        "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
        "intermediate_size": 8192, "vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
        "rope_parameters": _LLAMA3}, sharper=1.5),
}


def make(name: str, folder: Path, seed: int = 0) -> Path:
    """The checkpoint of a shape in bf16 at `folder / name`, made if it is not there. Needs torch and transformers."""
    target = folder / name
    if (target / "tokenizer.json").is_file():  # written last
        return target
    import torch
    import transformers

    shape = SHAPES[name]
    config = getattr(transformers, shape.kind)(**shape.arguments, tie_word_embeddings=True, bos_token_id=1, eos_token_id=0,
                                               pad_token_id=2)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # Biases of 0 and norms of 1, as transformers leaves them, would hide a converter that drops them; attention that sees
    # all tokens alike and adds little would hide wrong positions and a wrong cache.
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter, value in model.named_parameters():
            if parameter.endswith("bias"):
                value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
            elif "norm" in parameter:
                value.copy_(1 + torch.randn(value.shape, generator=generator) * 0.1)
            elif parameter.endswith(("q_proj.weight", "k_proj.weight", "o_proj.weight")):
                value.mul_(shape.sharper)
    shutil.rmtree(target, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(target)
    _tokenizer(folder / "merges.json", config.vocab_size).save_pretrained(target)
    return target


def _tokenizer(trained: Path, size: int) -> Any:
    """A byte-level BPE tokenizer with `size` tokens; merges are learnt once, from the standard library's source."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if not trained.is_file():
        source = Path(sysconfig.get_paths()["stdlib"])
        files = sorted(p for p in source.rglob("*.py") if "site-packages" not in p.parts)
        learnt = Tokenizer(models.BPE())
        learnt.pre_tokenizer = level
        trainer = trainers.BpeTrainer(vocab_size=TRAINED, special_tokens=[END, BEGIN, PAD], show_progress=False,
                                      initial_alphabet=level.alphabet())
        learnt.train_from_iterator((p.read_text(encoding="utf-8", errors="replace") for p in files), trainer)
        learnt.save(str(trained))
    base = json.loads(trained.read_text())["model"]
    vocabulary = base["vocab"] | {f"fill{i}": i for i in range(len(base["vocab"]), size)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[tuple(m) for m in base["merges"]]))
    tokenizer.pre_tokenizer, tokenizer.decoder = level, decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=BEGIN, pad_token=PAD)


def operations(checkpoint: Path) -> tuple[int, int]:
    """What the linear layers compute: for each token, and for each row of logits; a multiply-add is two."""
    with open(checkpoint / "model.safetensors", "rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    sizes = {name: math.prod(entry["shape"]) for name, entry in header.items()
             if name != "__metadata__" and len(entry["shape"]) == 2}
    head = sizes.pop("model.embed_tokens.weight")
    return 2 * sum(sizes.values()), 2 * head
