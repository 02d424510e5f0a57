"""Passes from outside: proving them, compiling with them, and what is wrong with some."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from inferloom.checks.check_pass import check_pass
from inferloom.checks.model import attention_model
from inferloom.compiler import plugins
from inferloom.compiler.build import compile_model
from inferloom.ir.errors import UnsupportedError
from inferloom.runtime.llm import LLM
from inferloom.runtime.params import SamplingParams
from tests.test_cli import inferloom as command

EXAMPLE = Path(__file__).parents[1] / "examples" / "my_variant" / "my_variant.py"
HEAD = "from inferloom.compiler.attention import HEAD, K_POS, Q_POS, SCORE, Variant\nfrom inferloom.ir.expr import *\n"


def write(folder: Path, body: str) -> str:
    path = folder / "pass_file.py"
    path.write_text(HEAD + body)
    return str(path)


def test_the_example_is_proved() -> None:
    assert len(EXAMPLE.read_text().splitlines()) <= 60
    results = {r.name: r for r in check_pass(str(EXAMPLE))}
    assert {r.ok for name, r in results.items() if name != "speed"} == {True}
    kinds = ("dense", "chunks", "decode", "cached", "batch", "pages")
    assert list(results) == ["meaning", *(f"{t}: {k}" for t in ("cpu", "gpu") for k in kinds), "speed"]
    for target in ("cpu", "gpu"):  # 63 keys back from the last of 100 is the key at 36, in the third page
        assert results[f"{target}: pages"].text.startswith("the query at 99 reads 5 of 7 pages; 5 hold")


@pytest.mark.parametrize(("body", "failed"), [
    # `first` is past keys that are visible: pages are not read that should be.
    ("VARIANT = Variant('late', lambda node, operands, spec: spec.see_only(Q_POS - K_POS < 60, maximum(Q_POS - 20, Const(0))))",
     {"cpu: dense", "cpu: pages"}),
    # The file's own words say something else.
    ("VARIANT = Variant('other', lambda node, operands, spec: spec.see_only(Q_POS - K_POS < 5, maximum(Q_POS - 4, Const(0))))\n"
     "def reference(q, k, v, scale):\n    return q * 0\n", {"meaning"}),
])
def test_what_is_wrong_fails(body: str, failed: set[str], tmp_path: Path) -> None:
    results = check_pass(write(tmp_path, body), gpu=False, speed=False)
    assert {r.name for r in results if r.ok is False} >= failed


def test_scores_and_single_layers(tmp_path: Path) -> None:
    body = """
from dataclasses import replace
def apply(node, operands, spec):
    return replace(spec, score=spec.score - 0.1 * call("abs", Q_POS - K_POS) * (HEAD + 1)) if node.attrs["slot"] else spec
VARIANT = Variant("falling", apply)
"""
    results = {r.name: r for r in check_pass(write(tmp_path, body), gpu=False, speed=False)}
    assert all(r.ok in (True, None) for r in results.values())
    assert "7 of 7 pages" in results["cpu: pages"].text


def test_passes_over_the_graph(tmp_path: Path) -> None:
    body = """
from inferloom.ir.graph import rewrite
def run(graph, report):
    def visit(builder, node, operands):
        if node.op != "attention":
            return None
        return builder.emit_node("attention", operands, dict(node.attrs) | {"window": 20}, node.loc).results
    return rewrite(graph, visit)
"""
    results = {r.name: r for r in check_pass(write(tmp_path, body), gpu=False, speed=False)}
    assert all(r.ok in (True, None) for r in results.values())
    assert "reads 2 of 7 pages; 2 hold" in results["cpu: pages"].text


@pytest.mark.parametrize(("body", "message"), [
    ("VARIANT = 3", "VARIANT must be"), ("x = 1", "neither VARIANT nor run"), ("raise ValueError('no')", "ValueError: no"),
    ("def f(:", "SyntaxError")])
def test_files_that_are_no_passes(body: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=message):
        plugins.load([write(tmp_path, body)])


def test_names_that_nobody_offers() -> None:
    with pytest.raises(UnsupportedError, match=r"neither a .py file nor offered.*offered: .*document-mask"):
        plugins.load(["dilated"])
    with pytest.raises(UnsupportedError, match="no such file"):
        plugins.load(["nothing.py"])


def test_installed_packages_offer_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_variant.py").write_text(EXAMPLE.read_text())
    info = tmp_path / "my_variant-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-variant\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("[inferloom.passes]\ndilated = my_variant\n")
    monkeypatch.syspath_prepend(tmp_path)
    (made,) = plugins.load(["dilated"])
    assert made.name == "dilated" and made.variant is not None and made.variant.name == "dilated"


def test_compiled_served_and_recorded(tiny_checkpoint: Path, tiny_artifact: Path, tmp_path: Path,
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "dilated"
    assert command(monkeypatch, "compile", str(tiny_checkpoint), "--pass", str(EXAMPLE), "--dtype", "fp32", "--out", str(out),
                   "--max-tokens", "64", "--max-seqs", "8") == 0
    manifest = json.loads((out / "manifest.json").read_text())
    (loaded,) = plugins.load([str(EXAMPLE)])
    assert manifest["numerics"]["passes"] == f"my_variant {loaded.digest}"
    ids = np.random.default_rng(0).integers(3, 200, 90).tolist()
    params = SamplingParams(temperature=0, max_tokens=8, logprobs=3, ignore_eos=True)
    with LLM(out, threads=1) as ours, LLM(tiny_artifact, threads=1) as theirs:
        assert {g.kind for g in ours.manifest.state.groups} == {"window_kv"}
        mine, other = (llm.generate([ids, ids[:20]], params) for llm in (ours, theirs))
        assert mine[0].outputs != other[0].outputs
        # Of eight tokens, all of them near.
        assert np.array_equal(ours.logits(ids[:8]), theirs.logits(ids[:8]))


def test_the_cache_knows_a_pass_by_its_content(tmp_path: Path) -> None:
    from inferloom.cache import CompileOptions, content_key

    demo = Path(__file__).parents[1] / "models" / "demo"
    first = write(tmp_path, "VARIANT = Variant('a', lambda node, operands, spec: spec)")
    keys = [content_key(demo, CompileOptions()), content_key(demo, CompileOptions(passes=(first,)))]
    write(tmp_path, "VARIANT = Variant('b', lambda node, operands, spec: spec)")
    keys.append(content_key(demo, CompileOptions(passes=(first,))))
    keys += [content_key(demo, CompileOptions(passes=(f"block-sparse:blocks={n}",))) for n in (2, 3)]
    assert len(set(keys)) == 5


def test_the_command_reports_and_exits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                       capsys: pytest.CaptureFixture[str]) -> None:
    late = write(tmp_path, "VARIANT = Variant('late', lambda n, o, spec: spec.see_only(Q_POS - K_POS < 60, Q_POS - 9))")
    assert command(monkeypatch, "check-pass", late, "--no-gpu", "--no-speed", "--json") == 1
    made = json.loads(capsys.readouterr().out)
    assert not made["ok"] and any(r["name"] == "cpu: pages" and "misses" in r["text"] for r in made["results"])


@pytest.mark.parametrize("gpu", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("name", "pages"), [("prefix-lm", "reads 7 of 7 pages; 7 hold"),
                                             ("document-mask", "reads 3 of 7 pages; 3 hold"),
                                             ("block-sparse:blocks=2,size=16", "chooses its pages")])
def test_what_comes_along_is_proved(name: str, pages: str, gpu: bool) -> None:
    results = {r.name: r for r in check_pass(name, gpu=gpu, speed=False)}
    assert all(r.ok in (True, None) for r in results.values())
    assert {r.text for n, r in results.items() if n.endswith(": pages") and pages not in r.text} == set()
    assert len([n for n in results if n.endswith(": pages")]) == 1 + gpu


@pytest.mark.parametrize(("name", "message"), [
    ("block-sparse:blocks=2,sizes=16", "unexpected keyword argument 'sizes'; it is called as make"),
    ("block-sparse:blocks=2,16", "name=value"), ("prefix-lm:length=3", "takes no options"),
])
def test_options_that_are_wrong(name: str, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        plugins.load([name])


def test_blocks_of_another_size(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="have 64 keys, those of the cache 16 tokens: compile with block_tokens=64"):
        check_pass("block-sparse:size=64", gpu=False, speed=False)


def test_means_of_blocks_are_in_the_memory_contract(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    out = compile_model(attention_model(), tmp_path / "model", dtype="fp32", block_tokens=16, max_tokens=64, max_seqs=4,
                        passes=["block-sparse:blocks=2,size=16"])
    assert command(monkeypatch, "inspect", str(out)) == 0
    assert "2 layers x 2 heads x 16 tokens x (16 + 16) x 4 bytes + 2 layers x 2 x 16 x 4 bytes" in capsys.readouterr().out


@pytest.mark.parametrize("gpu", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_layers_that_share_keys_and_values_share_their_state(gpu: bool, tmp_path: Path) -> None:
    body = """
from inferloom.ir.graph import rewrite
def run(graph, report):
    first = []
    def visit(builder, node, operands):
        if node.op != "attention":
            return None
        if not first:
            first.extend(operands[1:3])
            return None
        return builder.emit_node("attention", (operands[0], *first), dict(node.attrs) | {"window": 20}, node.loc).results
    return rewrite(graph, visit)
"""
    name = write(tmp_path, body)
    results = {r.name: r for r in check_pass(name, gpu=gpu, speed=False)}
    assert all(r.ok in (True, None) for r in results.values())
    assert "reads 7 of 7 pages; 7 hold" in results["cpu: pages"].text
    out = compile_model(attention_model(), tmp_path / "model", dtype="fp32", block_tokens=16, max_tokens=64, max_seqs=4,
                        passes=[name])
    state = json.loads((out / "manifest.json").read_text())["state"]
    assert [(g["kind"], len(g["layers"])) for g in state["groups"]] == [("paged_kv", 1)]
    assert state["bytes_per_block"] == 16 * 2 * (16 + 16) * 4
