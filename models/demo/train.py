"""Train the demo model: `python -m inferloom.models.demo.train --minutes 50 --out DIR`.

A small Llama learns Python from the standard library of the interpreter that runs this. Linear weights are
trained with Muon (Jordan et al., 2024), embeddings and norms with AdamW; the learning rate is a cosine.
`--steps` makes a run that depends on nothing but its arguments. `--minutes` fits the schedule to the clock
instead: the rest of the cosine is re-planned at every step, so that a pause (SIGSTOP) or a busy machine costs
steps and the run still ends on time. What it costs most is the last quarter, which alone has long windows.
No pickle is read or written.
"""

import argparse
import json
import math
import os
import random
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from inferloom.models.demo.corpus import BOS, BOS_ID, EOS, EOS_ID, SourceFile, load_corpus, train_tokenizer
from inferloom.models.demo.report import Score, write_readme

CONTEXT = 1024
SHORT_CONTEXT = 256  # most of the run uses short windows, which cost less attention
SHORT_UNTIL = 0.75  # ... up to this share of the schedule
WARMUP_STEPS = 40
SPLIT_SPACES = 0.03


@dataclass(frozen=True, slots=True)
class Options:
    """One run. `steps` of 0 means as many as fit in `minutes`."""

    out: Path
    minutes: float = 50.0
    steps: int = 0
    threads: int = 1
    seed: int = 0
    batch_tokens: int = 4096
    muon_lr: float = 6e-3
    adam_lr: float = 4e-3
    weight_decay: float = 0.1
    tokenizer: Path | None = None


def model_config() -> LlamaConfig:
    """The architecture: 6.2 million parameters, grouped-query attention (8 query heads, 4 KV heads)."""
    return LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=7,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        dtype="bfloat16",
    )


class Windows:
    """Draws training windows; the draw for a step depends on the seed and the step alone.

    Every window is `BOS` followed by consecutive tokens. Half of them begin where a line begins at column 0,
    so that a prompt such as `def ` looks like what the model has seen; the others begin anywhere.
    """

    def __init__(self, tokenizer: Tokenizer, files: tuple[SourceFile, ...], seed: int) -> None:
        encoded = tokenizer.encode_batch([file.text for file in files], add_special_tokens=False)
        stream = split_spaces(tokenizer, (i for one in encoded for i in [*one.ids, EOS_ID]), seed)
        self.stream = torch.tensor(stream, dtype=torch.int64)
        newline = torch.zeros(tokenizer.get_vocab_size(), dtype=torch.bool)
        newline[EOS_ID] = True
        for i in range(tokenizer.get_vocab_size()):
            newline[i] |= tokenizer.decode([i]).endswith("\n")
        starts = torch.nonzero(newline[self.stream]).flatten() + 1
        self.starts = starts[starts < len(self.stream) - CONTEXT]
        self.seed = seed

    def draw(self, step: int, rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets, each `[rows, length]` int64."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        anywhere = torch.randint(len(self.stream) - length, (rows - rows // 2,), generator=generator)
        line = self.starts[torch.randint(len(self.starts), (rows // 2,), generator=generator)]
        index = torch.cat([anywhere, line])[:, None] + torch.arange(length)
        targets = self.stream[index]
        bos = torch.full((rows, 1), BOS_ID)
        return torch.cat([bos, targets[:, :-1]], dim=1), targets


def split_spaces(tokenizer: Tokenizer, ids: Iterable[int], seed: int) -> list[int]:
    """Split a few tokens such as ` name` into a space and `name`, so that a prompt may end in a space."""
    vocabulary = tokenizer.get_vocab()
    space = tokenizer.encode(" ", add_special_tokens=False).tokens[0]
    tails = {
        i: vocabulary[token.removeprefix(space)]
        for token, i in vocabulary.items()
        if token.startswith(space) and token.removeprefix(space) in vocabulary
    }
    chance = random.Random(seed)
    split = []
    for i in ids:
        if i in tails and chance.random() < SPLIT_SPACES:
            split += [vocabulary[space], tails[i]]
        else:
            split.append(i)
    return split


def window_loss(model: LlamaForCausalLM, inputs: torch.Tensor, targets: torch.Tensor, reduction: str) -> torch.Tensor:
    """Cross entropy in nats; the matmuls run in bf16, the loss in f32."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=inputs, use_cache=False).logits
    return cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction=reduction)


@torch.no_grad()
def evaluate(
    model: LlamaForCausalLM, tokenizer: Tokenizer, files: tuple[SourceFile, ...], context: int = CONTEXT
) -> Score:
    """Held-out score: each file and its `EOS` in windows of up to `context` tokens, each after one `BOS`."""
    model.eval()
    nats, tokens = 0.0, 0
    for file in files:
        ids = torch.tensor([*tokenizer.encode(file.text, add_special_tokens=False).ids, EOS_ID])
        for targets in ids.split(context):
            inputs = torch.cat([torch.tensor([BOS_ID]), targets[:-1]])
            nats += window_loss(model, inputs[None], targets[None], "sum").item()
        tokens += len(ids)
    return Score(nats, tokens, sum(len(file.text.encode()) for file in files), len(files))


def learning_rate(step: int, progress: float) -> float:
    """The share of the peak rate: a linear warm-up over steps times a cosine over `progress` in [0, 1]."""
    return min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * progress))


def optimizers(model: LlamaForCausalLM, options: Options) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the tied embedding and the norms."""
    matrices: list[torch.nn.Parameter] = []
    rest: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and "embed" not in name else rest).append(parameter)
    muon = torch.optim.Muon(
        matrices, lr=options.muon_lr, weight_decay=options.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    adam = torch.optim.AdamW(rest, lr=options.adam_lr, betas=(0.9, 0.95), weight_decay=0.0)
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return [muon, adam]


def fit(model: LlamaForCausalLM, windows: Windows, options: Options) -> int:
    """Train in place and return the number of steps taken."""
    steppers = optimizers(model, options)
    end = time.monotonic() + options.minutes * 60
    seconds: deque[float] = deque(maxlen=20)  # their median ignores the one step that a pause fell into
    progress, step, smooth = 0.0, 0, math.log(model.config.vocab_size)
    model.train()
    while progress < 1.0:
        began = time.monotonic()
        length = SHORT_CONTEXT if progress < SHORT_UNTIL else CONTEXT
        inputs, targets = windows.draw(step, max(2, options.batch_tokens // length), length)
        loss = window_loss(model, inputs, targets, "mean")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in steppers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * learning_rate(step, progress)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        now = time.monotonic()
        seconds.append(now - began)
        typical = statistics.median(seconds)
        left = options.steps - step if options.steps else int((end - now) / typical)
        progress = 1.0 if left <= 0 else progress + (1.0 - progress) / (left + 1)
        smooth += 0.05 * (loss.item() - smooth)
        if step % 20 == 0 or progress >= 1.0:
            speed = options.batch_tokens / typical
            print(f"step {step} progress {progress:.3f} loss {smooth:.3f} {speed:.0f} tokens/s", flush=True)
    return step


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Write weights (bf16 safetensors), configs and tokenizer, in the layout of a Hugging Face checkpoint."""
    out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(bos_token_id=BOS_ID, eos_token_id=EOS_ID, do_sample=False)
    model.save_pretrained(out)
    tokenizer.save(str(out / "tokenizer.json"))
    about = {
        "bos_token": BOS,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,
        "model_max_length": CONTEXT,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (out / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Train, score, save, and write the README beside the weights."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    corpus = load_corpus()
    config = model_config()
    if options.tokenizer is not None:
        tokenizer = Tokenizer.from_file(str(options.tokenizer / "tokenizer.json"))
    else:
        tokenizer = train_tokenizer((file.text for file in corpus.train), config.vocab_size)
    model = LlamaForCausalLM(config).float()
    windows = Windows(tokenizer, corpus.train, options.seed)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters} parameters, {len(windows.stream)} training tokens, {asdict(options)}", flush=True)
    steps = fit(model, windows, options)
    save(model, tokenizer, options.out)
    trained = LlamaForCausalLM.from_pretrained(options.out)
    scores = {length: evaluate(trained, tokenizer, corpus.held_out, length) for length in (SHORT_CONTEXT, CONTEXT)}
    for length, score in scores.items():
        print(
            f"held out, windows of {length}: perplexity {score.perplexity:.3f} per token, "
            f"{score.bits_per_byte:.4f} bits per byte"
        )
    write_readme(options.out, scores, len(corpus.train), len(windows.stream), steps, options.batch_tokens, options.seed)
    return 0


def parse(arguments: list[str] | None) -> Options:
    """Command line to `Options`; the defaults stand in `Options` alone."""
    defaults = Options(out=Path("demo"))
    parser = argparse.ArgumentParser(description="Train the demo model on this Python's own library.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint and its README")
    parser.add_argument("--minutes", type=float, default=defaults.minutes, help="for training, pauses included")
    parser.add_argument("--steps", type=int, default=defaults.steps, help="exact number; overrides --minutes")
    parser.add_argument("--threads", type=int, default=defaults.threads)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--batch-tokens", type=int, default=defaults.batch_tokens)
    parser.add_argument("--muon-lr", type=float, default=defaults.muon_lr)
    parser.add_argument("--adam-lr", type=float, default=defaults.adam_lr)
    parser.add_argument("--weight-decay", type=float, default=defaults.weight_decay)
    parser.add_argument("--tokenizer", type=Path, help="folder of a tokenizer.json to keep")
    options = Options(**vars(parser.parse_args(arguments)))
    if options.steps < 0 or options.threads < 1 or (options.steps == 0 and options.minutes <= 0):
        parser.error("--minutes and --threads must be positive, --steps must not be negative")
    if options.batch_tokens < 2 * SHORT_CONTEXT:
        parser.error(f"--batch-tokens must be at least {2 * SHORT_CONTEXT}")
    return options


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
