"""lm-evaluation-harness against the server: what it scores is what the engine says itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from inferloom.runtime.llm import LLM
from inferloom.runtime.params import SamplingParams
from tests.runtime.server.conftest import Server

pytestmark = [pytest.mark.slow, pytest.mark.skipif(find_spec("lm_eval") is None,
                                                   reason="needs lm-eval, of the extra test-clients")]

STARTS = ["def read_lines(path):", "import os\nimport", "class Stack:\n    def __init__(self", "for i in range("]
CHOICES = [" return", " self):", " sys", "n):"]


def write_task(folder: Path, name: str, docs: list[dict[str, Any]], **more: Any) -> None:
    """A task on a file: JSON is YAML."""
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    (folder / f"{name}.yaml").write_text(json.dumps({
        "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}},
        "test_split": "test", "doc_to_text": "{{text}}", "num_fewshot": 0, "target_delimiter": "", **more}))


def samples(folder: Path, name: str) -> list[dict[str, Any]]:
    (file,) = folder.rglob(f"samples_{name}_*.jsonl")
    return sorted(map(json.loads, file.read_text().splitlines()), key=lambda s: int(s["doc_id"]))


def test_what_it_scores_is_what_the_engine_says(server: Server, chat_artifact: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(chat_artifact / "tokenizer" / "tokenizer.json"))

    def ids(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    with LLM(chat_artifact, threads=1) as llm:
        greedy = SamplingParams(temperature=0, max_tokens=12, stop=["\n\n"])
        answers = [output.outputs[0].text for output in llm.generate([ids(text) for text in STARTS], greedy)]

        def score(text: str, choice: str) -> float:
            whole, begin = ids(text + choice), len(ids(text))
            assert whole[:begin] == ids(text), "lm-eval scores the tokens behind those of the text"
            output = llm.generate(whole, SamplingParams(max_tokens=1, prompt_logprobs=0))[0]
            assert output.prompt_logprobs is not None
            return sum(output.prompt_logprobs[i][whole[i]].logprob for i in range(begin, len(whole)))  # type: ignore[index]

        scores = [[score(text, choice) for choice in CHOICES] for text in STARTS]
    write_task(tmp_path, "loom_continue", [{"text": t, "target": a if i else "nothing of the kind"} for i, (t, a) in enumerate(
        zip(STARTS, answers, strict=True))], output_type="generate_until", doc_to_target="{{target}}",
        generation_kwargs={"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False, "temperature": 0},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}])
    write_task(tmp_path, "loom_choose", [{"text": t, "label": s.index(max(s))} for t, s in zip(STARTS, scores, strict=True)],
               output_type="multiple_choice", doc_to_choice=CHOICES, doc_to_target="label",
               metric_list=[{"metric": "acc", "aggregation": "mean", "higher_is_better": True}])
    arguments = (f"model=demo,base_url={server.url}/v1/completions,tokenizer={chat_artifact / 'tokenizer'},num_concurrent=4,"
                 "max_length=1000")
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", "--model", "local-completions", "--model_args", arguments, "--tasks",
         "loom_continue,loom_choose", "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out"), "--log_samples"],
        capture_output=True, text=True, timeout=300, check=False, env=os.environ | {
            "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"),
            "OPENAI_API_KEY": "none"})
    assert done.returncode == 0, done.stderr[-4000:]
    (file,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(file.read_text())["results"]
    assert results["loom_continue"]["exact_match,none"] == 0.75, "all but the one whose target is wrong"
    assert results["loom_choose"]["acc,none"] == 1.0
    assert [s["resps"][0][0] for s in samples(tmp_path / "out", "loom_continue")] == answers
    said = [[float(choice[0][0]) for choice in s["resps"]] for s in samples(tmp_path / "out", "loom_choose")]
    for got, want in zip(said, scores, strict=True):
        assert got == pytest.approx(want, abs=1e-3)
