"""Arguments and options that several commands share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from inferloom.cache import CompileOptions
from inferloom.errors import UsageError
from inferloom.runtime.manifest import POOLINGS

DTYPES = ("fp32", "fp16", "bf16")
TASKS = ("generate", "embed")


def complete_chip(incomplete: str) -> list[str]:
    """Chip names for the shell."""
    from inferloom.targets.chips import chips

    return [name for name in ("cpu", *chips()) if name.startswith(incomplete)]


def complete_dtype(incomplete: str) -> list[str]:
    """Element types for the shell."""
    return [name for name in DTYPES if name.startswith(incomplete)]


Model = Annotated[Path, typer.Argument(help="An artifact, or a checkpoint, GGUF file or ONNX file (compiled into the cache on "
                                            "first use).", show_default=False)]
Checkpoint = Annotated[Path, typer.Argument(help="A checkpoint (config.json and *.safetensors), or a GGUF or ONNX file or "
                                                 "its folder.", show_default=False)]
Chip = Annotated[str, typer.Option("--chip", help="Chip to compile for: see `inferloom chips`.",
                                   autocompletion=complete_chip)]
Dtype = Annotated[str, typer.Option("--dtype", help="fp32, bf16 or (GPUs only) fp16.", autocompletion=complete_dtype)]
Quant = Annotated[str | None, typer.Option("--quant", show_default=False, metavar="NAME",
                                           help="Weights in few bits: int8, int4, int4-g128, int4-g128-asym, ...")]
QuantHead = Annotated[str | None, typer.Option("--quant-head", show_default=False, metavar="NAME|none",
                                               help="The LM head; as the other layers, in 8 bits at least.")]
QuantEmbedding = Annotated[str | None, typer.Option("--quant-embedding", show_default=False, metavar="NAME|none",
                                                    help="The embedding; likewise. A tied one goes with the head.")]
QuantActivations = Annotated[str | None, typer.Option(
    "--quant-activations", show_default=False, metavar="int8|none",
    help="What quantised weights are multiplied by; int8 if not given, also for checkpoints that are quantised already.")]
MaxModelLen = Annotated[int | None, typer.Option("--max-model-len", min=1, show_default=False,
                                                 help="Longest sequence; the model's own limit if not given.")]
KvDtype = Annotated[str | None, typer.Option("--kv-dtype", "--kv-cache-dtype", show_default=False,
                                             help="What keys and values are kept in: bf16, int8, fp8; --dtype if not given.")]
Task = Annotated[str, typer.Option("--task", help="What for: generate, or embed (final hidden states instead of logits).")]
Pooling = Annotated[str | None, typer.Option("--pooling", show_default=False, metavar="|".join(POOLINGS),
                                             help="With --task embed: whose hidden state a vector is; what the checkpoint says, "
                                                  "or the last token's, if not given.")]
Normalize = Annotated[bool | None, typer.Option("--normalize/--no-normalize", show_default=False,
                                                help="With --task embed: make vectors as long as 1; what the checkpoint says, "
                                                     "or yes, if not given.")]
Passes = Annotated[list[str] | None, typer.Option("--pass", show_default=False, metavar="FILE|NAME",
                                                 help="A pass of your own: a .py file, or one that an installed package "
                                                      "offers. Its code runs.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, show_default=False,
                                             help="Threads; all cores if not given.")]
Pin = Annotated[bool, typer.Option("--pin/--no-pin", help="Keep each thread on a core.")]
Gpu = Annotated[int, typer.Option("--gpu", min=0, help="Number of the GPU, for artifacts of one.")]
Memory = Annotated[str | None, typer.Option("--memory", show_default=False, metavar="BYTES",
                                            help="Memory budget, e.g. 4GiB; part of what is free if not given.")]
Speculative = Annotated[str | None, typer.Option("--speculative", show_default=False, metavar="ngram|MODEL",
                                                 help="Draft tokens and check several at once: from the text itself, or "
                                                      "with a smaller model of the same tokenizer.")]
SpeculativeTokens = Annotated[int | None, typer.Option("--num-speculative-tokens", min=1, show_default=False,
                                                       help="Most tokens drafted at once; 4 if not given.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]


def compile_options(chip: str, dtype: str, max_model_len: int | None, quant: str | None = None, quant_head: str | None = None,
                    quant_embedding: str | None = None, quant_activations: str | None = None,
                    kv_dtype: str | None = None, task: str = "generate", pooling: str | None = None,
                    normalize: bool | None = None) -> CompileOptions:
    """Checked options. Raises `UsageError` for a dtype, task or pooling that is not known (chips are checked by the compiler)."""
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is not known; choose one of {', '.join(DTYPES)}")
    if task not in TASKS:
        raise UsageError(f"task {task!r} is not known; choose one of {', '.join(TASKS)}")
    if task != "embed" and (pooling is not None or normalize is not None):
        raise UsageError("--pooling and --normalize are of embeddings: they go with --task embed")
    if pooling not in (None, *POOLINGS):
        raise UsageError(f"pooling {pooling!r} is not known; choose one of {', '.join(POOLINGS)}")
    return CompileOptions(chip=chip, dtype=dtype, max_model_len=max_model_len, quant=quant, quant_head=quant_head,
                          quant_embedding=quant_embedding, quant_activations=quant_activations, kv_dtype=kv_dtype, task=task,
                          pooling=pooling, normalize=normalize)


def parse_bytes(text: str) -> int:
    """`4GiB`, `500MB`, `1.5g` or a plain number as bytes. Raises `UsageError`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text.lower())
    if match is None:
        raise UsageError(f"{text!r} is not an amount of memory; write for example 4GiB, 500MB or 1073741824")
    number, unit, binary = match.groups()
    step = 1024 if binary or (unit and not text.lower().rstrip().endswith("b")) else 1000
    return int(float(number) * step ** " kmgt".index(unit or " "))


def parse_counts(text: str) -> tuple[int, ...]:
    """`1,4,16` as numbers. Raises `UsageError`."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UsageError(f"{text!r} is not a list of counts; write for example 1,4,16")
    return tuple(int(part) for part in parts)


def speculative(method: str | None, tokens: int | None) -> Any:
    """A `SpeculativeConfig`, or None. Raises `UsageError` for a number without a method."""
    if method is None:
        if tokens is not None:
            raise UsageError("--num-speculative-tokens needs --speculative")
        return None
    from inferloom.runtime.speculative import SpeculativeConfig

    return SpeculativeConfig.of(method, tokens)
