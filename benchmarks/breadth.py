"""Which architectures of transformers compile, and whether their numbers are right: one small model of each.

    python -m inferloom.benchmarks.breadth --out build/breadth.jsonl
    python -m inferloom.benchmarks.breadth --out build/breadth.jsonl --publish compiler/architectures.json

Each architecture has a process of its own. What the file holds already is not done again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

#: Largest error, relative to the standard deviation of the logits.
TOLERANCE = 1e-3
LENGTHS = (40, 13, 21)
GPUS = {"nvidia": "h100", "amd": "mi300x"}
TIMEOUT = 600


def reference(model: Any, ids: list[int]) -> np.ndarray:
    """Logits f32 [tokens, vocab] of one sequence by transformers."""
    import torch

    for part in model.modules():  # recurrent_gemma keeps its state in its layers
        for name in ("recurrent_states", "conv1d_state"):
            if hasattr(part, name):
                setattr(part, name, None)
    with torch.no_grad():
        return np.asarray(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float())


def examine(name: str) -> dict[str, Any]:
    """One architecture: how far it comes, and why not further."""
    from inferloom.compiler.frontends import tiny

    made: dict[str, Any] = {"name": name}
    try:
        model = tiny.model(name)
        prompts = [np.random.default_rng(n).integers(3, tiny.VOCAB, n).tolist() for n in LENGTHS]
        want = [reference(model, p) for p in prompts]
        if not all(np.isfinite(w).all() for w in want):
            raise ValueError("transformers' logits are not finite")
        made["class"] = type(model).__name__
    except Exception as error:
        return made | {"model": _short(error)}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder) / "model")
        for step, work in (("cpu", lambda: _cpu(Path(folder), model, prompts, want)),
                           *((kind, lambda chip=chip: _compile(Path(folder), chip)) for kind, chip in GPUS.items())):
            try:
                made[step] = work()
            except Exception as error:
                made[step] = {"why": _short(error)}
    return made


def _compile(folder: Path, chip: str) -> dict[str, Any]:
    import inferloom

    path = inferloom.compile(folder / "model", chip=chip, dtype="bf16", out=folder / chip, max_tokens=64, max_seqs=8)
    return {"kernels": len(json.loads((path / "manifest.json").read_text())["kernels"])}


def _cpu(folder: Path, model: Any, prompts: list[list[int]], want: list[np.ndarray]) -> dict[str, Any]:
    """Errors of a single sequence, and of a ragged batch through chunked prefill and decode."""
    import inferloom
    from inferloom import LLM, SamplingParams

    path = inferloom.compile(folder / "model", dtype="fp32", out=folder / "cpu", max_tokens=64, max_seqs=8, block_tokens=16)
    made: dict[str, Any] = {}
    with LLM(path, threads=1) as llm:
        made["state"] = sorted({g.kind for g in llm.manifest.state.groups})
        made["single"] = max(relative(llm.logits(p), w) for p, w in zip(prompts, want))
    greedy = SamplingParams(temperature=0, max_tokens=6, logprobs=5, ignore_eos=True)
    with LLM(path, threads=1, max_num_batched_tokens=17) as llm:
        worst = 0.0
        for prompt, first, output in zip(prompts, want, llm.generate(prompts, greedy)):
            if output.error:
                raise RuntimeError(output.error)
            answer = output.outputs[0]
            logits = np.concatenate([first[-1:], reference(model, [*prompt, *answer.token_ids])[len(prompt):-1]])
            logprobs = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)) \
                - logits.max(-1, keepdims=True)
            for row, entry in zip(logprobs, answer.logprobs or ()):
                worst = max(worst, *(abs(row[token] - entry[token].logprob) / first.std() for token in entry))
        made["batched"] = float(worst)
    if not made["single"] <= TOLERANCE or not made["batched"] <= TOLERANCE:
        made["why"] = f"wrong: {made['single']:.1e} alone, {made['batched']:.1e} in a batch"
    return made


def relative(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got - want).max() / want.std())


def _short(error: Exception) -> str:
    """The first line of an error, and the first of what it lists."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])}"[:300]


def main() -> None:
    from inferloom.compiler.frontends.tiny import architectures

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="architectures (default: all that transformers has)")
    parser.add_argument("--out", type=Path, default=Path("build/breadth.jsonl"))
    parser.add_argument("--publish", type=Path, help="write the results as one document, and do nothing else")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(examine(options.one)))
        return
    held = {}
    if options.out.exists():
        held = {entry["name"]: entry for entry in map(json.loads, options.out.read_text().splitlines())}
    if options.publish:
        from inferloom.compiler.architectures import document

        options.publish.write_text(json.dumps(document(held.values()), indent=1, sort_keys=True) + "\n")
        return
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for name in options.names or [n for n in architectures() if n not in held]:
        command = [sys.executable, "-m", "inferloom.benchmarks.breadth", "--one", name]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
            made = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {
                "name": name, "model": f"process died: {done.stderr.strip().splitlines()[-1:]}"}
        except subprocess.TimeoutExpired:
            made = {"name": name, "model": f"took more than {TIMEOUT} s"}
        with options.out.open("a") as file:
            file.write(json.dumps(made, sort_keys=True) + "\n")
        print(name, made.get("model") or {k: made[k].get("why", "ok") for k in ("cpu", *GPUS)}, flush=True)


if __name__ == "__main__":
    main()
