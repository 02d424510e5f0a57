"""Compiles beforehand, on any machine, what a run on a GPU needs: kernels and JSON, never weights.

    python -m inferloom.benchmarks.gpu.build --chip h100 --out build/gpu

`OUT/<chip>/models/<name>/` holds a whole model's manifest, kernel-level graph and kernels; `sets.json` single kernels
in the configuration that the compiler chooses and in others that might be better, `kernels/` their code. The same
sources give the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from inferloom.benchmarks.gpu import shapes
from inferloom.compiler import build as compiler
from inferloom.compiler.plan import row_elements
from inferloom.ir.errors import UnsupportedError
from inferloom.ir.expr import Const, Var
from inferloom.ir.graph import Builder, Value
from inferloom.ir.text import print_graph
from inferloom.ir.types import Affine, DType, StateType, Sym, TensorType
from inferloom.runtime.manifest import ALIGN, KERNELS_FILE, MANIFEST, dumps
from inferloom.targets.base import KernelSource, Layout, Scratch
from inferloom.targets.chips import GpuChip, find
from inferloom.targets.link import link_shared
from inferloom.targets.triton.aot import Binary, Compiler, module_text, violations
from inferloom.targets.triton.attention import Attention, heads_of, padded
from inferloom.targets.triton.codegen import DECODE_ROWS, LAUNCHER, TritonTarget
from inferloom.targets.triton.configs import AttentionConfig, MatmulConfig
from inferloom.targets.triton.matmul import Matmul
from inferloom.targets.triton.source import KernelText

GRAPH, BUFFERS, SETS = "graph.txt", "buffers.json", "sets.json"
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Candidate:
    """Kernels that do one piece of work in one configuration; `about` is what the JSON says of them."""

    name: str
    source: KernelSource
    texts: tuple[KernelText, ...]
    scratch: int
    about: dict[str, Any]


def build(chip: str, out: Path, job: shapes.Job, say: Say = print) -> Path:
    """Build a job for a chip; returns the folder of the chip, which is made anew."""
    found = find(chip)
    if not isinstance(found, GpuChip) or found.driver != "cuda":
        raise UnsupportedError(f"{chip} is not an NVIDIA GPU")
    folder = out / chip
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "kernels").mkdir(parents=True)
    (folder / KERNELS_FILE).write_bytes(link_shared([], [LAUNCHER], found.triple))
    for model in job.models:
        _model(found, folder / "models" / model.name, model, job, say)
    _sets(found, folder, job, say)
    return folder


# -- whole models

def traced(model: shapes.Model, max_model_len: int) -> tuple[Any, dict[str, list[float]]]:
    """The traced model, which has no weights, and its computed buffers by source."""
    import transformers

    from inferloom.compiler.frontends.huggingface import TracedModel, trace_config

    config = getattr(transformers, model.kind)(**model.arguments)
    trace, skeleton = trace_config(config)
    buffers = {name: array.reshape(-1).tolist() for name, array in trace.imported.buffers.items()}
    made = TracedModel(trace.imported.graph, None, model.name, type(skeleton).__name__,  # type: ignore[arg-type]
                       int(config.vocab_size), max_model_len, (0,), None, {})
    return made, buffers


def _model(chip: GpuChip, folder: Path, model: shapes.Model, job: shapes.Job, say: Say) -> None:
    target, options = TritonTarget(chip), compiler.BuildOptions("bf16", **job.limits)  # type: ignore[arg-type]
    trace, buffers = traced(model, job.limits["max_model_len"])
    compiled = compiler.compile_graph(trace, target, options, lambda text: say(f"{model.name}: {text}"))
    manifest = compiler.describe(trace, target, options, compiled, ALIGN)
    (folder / "kernels").mkdir(parents=True)
    for name, data in sorted(compiled.module.files.items()):
        if name != KERNELS_FILE:
            (folder / name).write_bytes(data)
    (folder / MANIFEST).write_bytes(dumps(manifest))
    (folder / GRAPH).write_text(print_graph(compiled.graph))
    (folder / BUFFERS).write_text(json.dumps({"config": asdict(model), "buffers": buffers}) + "\n")


# -- single kernels

def _sets(chip: GpuChip, folder: Path, job: shapes.Job, say: Say) -> None:
    sets: list[dict[str, Any]] = []
    rejected: list[dict[str, Any]] = []
    texts: list[KernelText] = []
    with Compiler(chip) as worker:
        groups: list[tuple[str, list[Candidate]]] = [
            *((f"matmul {s.n} x {s.k}", _matmul(chip, s, job.variants)) for s in job.linears),
            *((f"attention {h.q}/{h.kv} x {h.dim}", _attention(chip, h, job.variants)) for h in job.heads)]
        for title, candidates in groups:
            say(f"{title}: {len(candidates)} configurations")
            for candidate, made in zip(candidates, _compile(worker, candidates), strict=True):
                wrong = [made] if isinstance(made, str) else [
                    p for b, t in zip(made, candidate.texts) for p in violations(b, t, chip)]
                if wrong or isinstance(made, str):
                    rejected.append({"name": candidate.name, **candidate.about, "why": "; ".join(wrong)})
                    continue
                for text, binary in zip(candidate.texts, made):
                    (folder / "kernels" / f"{text.symbol}.cubin").write_bytes(binary.data)
                sets.append(_describe(candidate, made))
                texts += candidate.texts
    (folder / "kernels" / "kernels.py").write_text(module_text(texts))
    (folder / SETS).write_text(json.dumps({"chip": chip.name, "arch": chip.arch, "sets": sets, "rejected": rejected},
                                          indent=1, sort_keys=True) + "\n")


def _compile(worker: Compiler, candidates: Sequence[Candidate]) -> list[list[Binary] | str]:
    """The code of each candidate, or why there is none."""
    try:
        flat = iter(worker.compile([t for c in candidates for t in c.texts]))
        return [[next(flat) for _ in c.texts] for c in candidates]
    except UnsupportedError:
        made: list[list[Binary] | str] = []
        for candidate in candidates:
            try:
                made.append(worker.compile(candidate.texts))
            except UnsupportedError as error:
                made.append(str(error))
        return made


def _describe(candidate: Candidate, binaries: Sequence[Binary]) -> dict[str, Any]:
    body = candidate.source.node.attrs["body"]
    names = [*(v.name for v in body.inputs), "out"]  # type: ignore[union-attr]

    def argument(arg: object) -> str | int:
        return arg.offset if isinstance(arg, Scratch) else arg if isinstance(arg, str) else names[arg]  # type: ignore[call-overload,no-any-return]

    kernels = [{"symbol": t.symbol, "file": f"kernels/{t.symbol}.cubin", "bytes": len(b.data), "threads": b.threads,
                "shared": b.shared, "registers": b.registers, "grid": list(t.grid), "least": t.least, "most": t.most,
                "args": [argument(a) for a in t.args]} for t, b in zip(candidate.texts, binaries)]
    text = "\n".join(t.text().replace(candidate.source.symbol, "kernel") for t in candidate.texts)
    return {"name": candidate.name, **candidate.about, "scratch": candidate.scratch, "kernels": kernels,
            "hash": hashlib.sha256(text.encode()).hexdigest()[:16]}


def _matmul(chip: GpuChip, shape: shapes.Linear, variants: int) -> list[Candidate]:
    def emit(b: Builder) -> Value:
        x = b.input("x", TensorType(DType.BF16, (Sym("tokens", max(shape.rows())), shape.k)))
        w = b.input("w", TensorType(DType.BF16, (shape.n, -(-shape.k // 16) * 16, 1, 1)))
        return b.emit("cast", b.emit("packed_linear", x, w, n=shape.n, k=shape.k), dtype=DType.BF16)

    made = []
    for number, (least, most, config) in enumerate(shapes.matmuls(chip, shape, variants)):
        name = f"matmul_{shape.n}x{shape.k}_{number}"
        source = _source(name, "matmul", emit)
        matmul = Matmul(source, 0, chip)
        about = {"op": "matmul", "n": shape.n, "k": shape.k, "rows": [least, most], "config": changed(config)}
        made.append(Candidate(name, source, tuple(matmul.lower(config, least, most, "")),
                              matmul.scratch_bytes(config, most), about))
    return made


def _attention(chip: GpuChip, heads: shapes.Heads, variants: int) -> list[Candidate]:
    def emit(b: Builder) -> Value:
        seqs, i32 = Sym("seqs", shapes.MAX_SEQS), DType.I32
        q = b.input("q", TensorType(DType.BF16, (Sym("tokens", max(n for n, _ in shapes.PREFILL)), heads.q, heads.dim)))
        state = b.input("state", StateType(DType.BF16, heads.kv, heads.dim, heads.dim, shapes.BLOCK))
        steps = [b.input("seq_starts", TensorType(i32, (Affine(seqs, 1, 1),))), b.input("kv_lens", TensorType(i32, (seqs,))),
                 b.input("block_tables", TensorType(i32, (seqs, shapes.CONTEXT // shapes.BLOCK)))]
        out = b.emit("paged_attention", q, state, *steps, scale=heads.dim**-0.5, score=Var("score"),
                     visible=Var("k_pos") <= Var("q_pos"), first=Const(0))
        return b.emit("cast", b.emit("reshape", out, shape=(q.type.shape[0], heads.q * heads.dim)),  # type: ignore[union-attr]
                      dtype=DType.BF16)

    made = []
    for op in ("decode", "prefill"):
        group = heads.q // heads.kv
        tokens = max(1, DECODE_ROWS // group)
        found = (shapes.decodes(chip, heads, tokens, variants) if op == "decode"
                 else shapes.prefills(chip, heads, variants))
        for number, config in enumerate(found):
            name = f"{op}_{heads.q}_{heads.kv}_{heads.dim}_{number}"
            source = _source(name, "attention", emit)
            attention, scratch = Attention(source, 0), 0
            if op == "decode":
                texts = (attention.decode(config, tokens), attention.join(config, tokens))
                scratch = sum(padded(s) for s in attention.scratch_sizes(config, max(DECODE_ROWS, config.m)))
            else:
                tokens = max(1, config.m // heads_of(source).size)
                texts = (attention.prefill(config, tokens),)  # type: ignore[assignment]
            about = {"op": op, "heads": [heads.q, heads.kv, heads.dim], "tile_tokens": tokens, "config": changed(config)}
            made.append(Candidate(name, source, texts, scratch, about))
    return made


def changed(config: MatmulConfig | AttentionConfig) -> dict[str, Any]:
    """What of a configuration is not at its default, as `configs.py` reads it."""
    return {f.name: getattr(config, f.name) for f in fields(config) if getattr(config, f.name) != f.default}


def _source(symbol: str, kind: str, emit: Callable[[Builder], Value]) -> KernelSource:
    """A kernel that stands alone, its rows next to each other."""
    inner = Builder("body")
    body = inner.finish([emit(inner)])
    outer = Builder("step")
    operands = [outer.input(v.name, v.type) for v in body.inputs]
    layouts = tuple(_layout(v) for v in (*body.inputs, *body.outputs))
    return KernelSource(symbol, outer.emit_node("kernel", operands, {"kind": kind, "body": body}, symbol), layouts)


def _layout(value: Value) -> Layout:
    if isinstance(value.type, StateType):
        return Layout("state", 0, value.type.bytes_per_block)
    if not isinstance(value.type, TensorType):
        raise TypeError(value)
    if value.type.is_static:
        return Layout("weights")
    return Layout("input") if value.type.dtype is DType.I32 else Layout("workspace", row_elements(value.type))


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile the GPU benchmark's kernels.")
    parser.add_argument("--chip", default="h100")
    parser.add_argument("--out", type=Path, default=Path("build/gpu"))
    options = parser.parse_args()
    folder = build(options.chip, options.out, shapes.FULL)
    files = [f for f in folder.rglob("*") if f.is_file()]
    print(f"{folder}: {len(files)} files, {sum(f.stat().st_size for f in files) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
