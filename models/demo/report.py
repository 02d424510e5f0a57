"""What a finished training run says about itself: the held-out score, samples, and the README."""

import math
import platform
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaForCausalLM

PROMPTS = ("import os\n", "def ", "class Node:\n    def __init__(self, ")
SAMPLE_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Score:
    """Summed cross entropy over `tokens` predictions that cover `bytes` bytes of `files` files."""

    nats: float
    tokens: int
    bytes: int
    files: int

    @property
    def perplexity(self) -> float:
        """Per token; depends on the tokenizer."""
        return math.exp(self.nats / self.tokens)

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers."""
        return self.nats / math.log(2) / self.bytes


@torch.no_grad()
def complete(folder: Path, prompt: str, new_tokens: int) -> str:
    """The prompt and its greedy continuation, from the checkpoint in `folder`."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    encoded = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    ids = model.generate(**encoded, max_new_tokens=new_tokens, do_sample=False)
    return str(tokenizer.decode(ids[0], skip_special_tokens=True))


def write_readme(
    out: Path,
    scores: dict[int, Score],
    train_files: int,
    train_tokens: int,
    steps: int,
    batch_tokens: int,
    seed: int,
) -> None:
    """Write `out/README.md` from the held-out scores by window length and from fresh greedy samples."""
    score = scores[max(scores)]
    rows = "\n".join(f"| {n:,} tokens | {s.perplexity:.2f} | {s.bits_per_byte:.3f} |" for n, s in scores.items())
    python = platform.python_version()
    samples = "\n".join(f"```python\n{complete(out, p, SAMPLE_TOKENS).rstrip()}\n```" for p in PROMPTS)
    text = f"""# Demo model
A small Llama that completes Python. It ships so that every example, test and benchmark has a real, trained
checkpoint at hand, without a download. It is good enough to write plausible Python and for nothing else.

| | |
| --- | --- |
| Architecture | `LlamaForCausalLM`: 7 layers, hidden 256, 8 query and 4 KV heads of 32, MLP 704 |
| Parameters | 6,213,376, bf16, embeddings tied |
| Tokenizer | byte-level BPE, 4096 tokens, its own; `<\\|bos\\|>` first, `<\\|eos\\|>` after a file |
| Context | 1024 tokens |
| Data | the library of CPython {python} (PSF licence) without tests |
| Trained on | {train_files} files, {train_tokens:,} tokens |
| Training | {steps:,} steps of {batch_tokens:,} tokens on a CPU, seed {seed} |

## Quality
Measured by `evaluate` in `train.py` on {score.files} files ({score.bytes:,} bytes, {score.tokens:,} tokens)
that were chosen by a hash of their path and never trained on:

| Held out, in windows of | Perplexity per token | Bits per byte |
| --- | --- | --- |
{rows}

Greedy samples, {SAMPLE_TOKENS} tokens each (the prompts are {", ".join(f"`{p!r}`" for p in PROMPTS)}):

{samples}

## Train it again
```
python -m inferloom.models.demo.train --minutes 50 --threads 1 --seed 0 --out DIR
```
A run with `--minutes` plans its schedule from the clock, so no two such runs are the same. With `--steps N` the
schedule depends on N alone; two such runs with the same seed, thread count and library versions agree.
The files hold no pickle: weights are safetensors, the rest is JSON.
"""
    (out / "README.md").write_text(text, encoding="utf-8")
