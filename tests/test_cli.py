"""The command line: exit codes, clean stdout, messages that say what to do."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from inferloom import __version__, cache
from inferloom.cache import CompileOptions, content_key, resolve
from inferloom.cli import main
from inferloom.cli.console import human_bytes
from inferloom.cli.inspect import contract
from inferloom.cli.options import parse_bytes, parse_counts
from inferloom.errors import MissingExtraError, UsageError

MANIFEST: dict[str, Any] = {
    "schema": 3, "abi": 2, "versions": {"inferloom": "0"},
    "model": {"name": "toy", "architecture": "ToyForCausalLM", "vocab_size": 8, "max_model_len": 64,
              "eos_token_ids": [1], "bos_token_id": None, "dtype": "bf16"},
    "chip": {"name": "x86-64-v3", "triple": "x86_64-linux-gnu", "features": ["avx2"], "driver": "none", "arch": ""},
    "dims": {"tokens": 64, "seqs": 4, "rows": 4, "blocks_per_seq": 2},
    "state": {"block_tokens": 32, "bytes_per_block": 2 * 2 * 32 * 32 * 2,
              "groups": [{"kind": "paged_kv", "window": 0, "tables": 1, "layers": [
                  {"table": 0, "offset": 4096 * i, "bytes": 4096, "dtype": "bf16", "shape": [2, 16, 16]} for i in range(2)]}]},
    "memory": {"weights": 1000, "workspace": 200, "inputs": 24, "bytes_per_block": 8192},
    "output": {"name": "logits", "offset": 0, "ld": 16, "vocab": 8, "top": None},
    "kernels": [{"symbol": "k0_matmul", "kind": "matmul", "source": ["m/a.py:3", "m/a.py:7"],
                 "grid": {"dim": 0, "tile": 16, "mult": 2}, "launch": None, "resources": {}}],
    "plan": [{"kernel": 0, "args": []}, {"kernel": 0, "args": []}],
    "weights": {"file": "weights/model.safetensors", "data_offset": 64, "bytes": 1000},
    "files": {"weights/model.safetensors": {"bytes": 1064, "blake3": ""}},
}


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """A folder with a manifest, two IR texts and a report: enough for `inspect`."""
    made = tmp_path / "toy"
    (made / "ir").mkdir(parents=True)
    (made / "manifest.json").write_text(json.dumps(MANIFEST))
    (made / "ir" / "00-traced.txt").write_text("graph toy {\n  %0 = add %a, %b\n}\n")
    (made / "ir" / "01-cse.txt").write_text("graph toy {\n  %0 = mul %a, %b\n}\n")
    (made / "ir" / "report.json").write_text(json.dumps(
        [{"pass": "fuse", "what": "add into matmul", "done": True, "why": "", "loc": "m/a.py:3"},
         {"pass": "fuse", "what": "mul into matmul", "done": False, "why": "it changes the shape", "loc": "m/a.py:9"}]))
    return made


def inferloom(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run the command line in this process; returns the exit code."""
    monkeypatch.setattr(sys, "argv", ["inferloom", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


def test_version_and_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert inferloom(monkeypatch, "--version") == 0
    assert capsys.readouterr().out.strip() == __version__
    assert inferloom(monkeypatch, "--help") == 0
    text = capsys.readouterr().out
    assert all(command in text for command in ("compile", "run", "chat", "inspect", "chips", "bench", "doctor"))


@pytest.mark.parametrize("command", ["run", "inspect", "compile", "bench", "chat"])
def test_wrong_path_says_what_to_give(command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                      capsys: pytest.CaptureFixture[str]) -> None:
    extra = ["hello"] if command == "run" else []
    assert inferloom(monkeypatch, command, str(tmp_path), *extra) == 1
    shown = capsys.readouterr()
    assert shown.out == "" and "config.json" in shown.err and "Traceback" not in shown.err


def test_errors_are_json_when_asked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert inferloom(monkeypatch, "run", "/nowhere", "hello", "--json") == 1
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["type"] == "UsageError" and "/nowhere" in error["message"]


def test_wrong_usage_is_code_2(monkeypatch: pytest.MonkeyPatch) -> None:
    assert inferloom(monkeypatch, "run", "x", "y", "--max-tokens", "0") == 2
    assert inferloom(monkeypatch, "no-such-command") == 2


def test_a_bug_is_code_3_with_a_traceback(monkeypatch: pytest.MonkeyPatch, artifact: Path,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("inferloom.cli.inspect.contract", broken)
    assert inferloom(monkeypatch, "inspect", str(artifact)) == 3
    shown = capsys.readouterr().err
    assert "Traceback" in shown and "bug in inferloom" in shown


def test_inspect_shows_kernels_and_contract(monkeypatch: pytest.MonkeyPatch, artifact: Path,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    assert inferloom(monkeypatch, "inspect", str(artifact), "--memory", "20000") == 0
    shown = capsys.readouterr().out
    assert "k0_matmul" in shown and "m/a.py:3,7" in shown and "tokens/16 x 2" in shown
    assert "2 layers x 2 heads x 32 tokens x (16 + 16) x 2 bytes" in shown
    assert "2 blocks = (20000 - 1288) // 8192" in shown


def test_inspect_json_is_one_document(monkeypatch: pytest.MonkeyPatch, artifact: Path,
                                      capsys: pytest.CaptureFixture[str]) -> None:
    assert inferloom(monkeypatch, "inspect", str(artifact), "--json") == 0
    made = json.loads(capsys.readouterr().out)
    assert made["manifest"] == MANIFEST and made["contract"]["adds_up"]


def test_contract_notices_a_sum_that_does_not_add_up() -> None:
    wrong = MANIFEST | {"memory": MANIFEST["memory"] | {"bytes_per_block": 8200}}
    assert not contract(wrong)["adds_up"]
    assert contract(MANIFEST, 100)["blocks"] == 0


def test_inspect_ir(monkeypatch: pytest.MonkeyPatch, artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inferloom(monkeypatch, "inspect", str(artifact), "--ir", "list") == 0
    assert capsys.readouterr().out.split() == ["00-traced", "01-cse"]
    for name in ("01-cse", "cse", "01"):
        assert inferloom(monkeypatch, "inspect", str(artifact), "--ir", name) == 0
        assert "mul" in capsys.readouterr().out
    assert inferloom(monkeypatch, "inspect", str(artifact), "--ir", "cse", "--diff") == 0
    shown = capsys.readouterr().out
    assert "-  %0 = add %a, %b" in shown and "+  %0 = mul %a, %b" in shown
    assert inferloom(monkeypatch, "inspect", str(artifact), "--ir", "nope") == 1
    assert "00-traced, 01-cse" in capsys.readouterr().err


def test_inspect_why(monkeypatch: pytest.MonkeyPatch, artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inferloom(monkeypatch, "inspect", str(artifact), "--why") == 0
    shown = capsys.readouterr().out
    assert "it changes the shape" in shown and "m/a.py:9" in shown
    assert inferloom(monkeypatch, "inspect", str(artifact), "--why", "--json") == 0
    assert len(json.loads(capsys.readouterr().out)) == 2


def test_doctor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert inferloom(monkeypatch, "doctor", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["problems"] == [] and facts["memory"]["total"] > 0 and facts["packages"]["runtime"]["numpy"]
    assert inferloom(monkeypatch, "doctor") == 0
    assert "runtime can run here" in capsys.readouterr().out


def test_chips(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert inferloom(monkeypatch, "chips", "--json") == 0
    made = json.loads(capsys.readouterr().out)
    assert made["cpu"] in {chip["name"] for chip in made["chips"]}
    assert inferloom(monkeypatch, "chips") == 0
    assert made["cpu"] in capsys.readouterr().out


def test_models_prints_the_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert inferloom(monkeypatch, "models", "--json") == 0
    made = {a["name"]: a for a in json.loads(capsys.readouterr().out)["architectures"]}
    assert made["llama"]["fp32"] and made["llama"]["nvidia"] and made["llama"]["amd"] and not made["llama"]["why"]
    assert all(a["why"] for a in made.values() if not (a["fp32"] and a["nvidia"] and a["amd"]))
    assert inferloom(monkeypatch, "models") == 0
    assert "llama" in capsys.readouterr().out


def test_completion_knows_commands_and_dtypes() -> None:
    words = {"inferloom comp": "compile", "inferloom compile x --dtype b": "bf16"}
    for line, expected in words.items():
        env = os.environ | {"_INFERLOOM_COMPLETE": "complete_bash", "COMP_WORDS": line,
                            "COMP_CWORD": str(len(line.split()) - 1)}
        done = subprocess.run([Path(sys.executable).with_name("inferloom")], env=env, capture_output=True, text=True,
                              check=False)
        assert expected in done.stdout.split()


@pytest.mark.parametrize("text,count", [("4GiB", 4 << 30), ("4g", 4 << 30), ("500MB", 500_000_000), ("1.5 KiB", 1536),
                                        ("123", 123), ("123b", 123), ("2KB", 2000)])
def test_parse_bytes(text: str, count: int) -> None:
    assert parse_bytes(text) == count


def test_parse_errors() -> None:
    for bad in ("", "four", "4XB", "-1"):
        with pytest.raises(UsageError, match="amount of memory"):
            parse_bytes(bad)
    for bad in ("", "1,x", "0"):
        with pytest.raises(UsageError, match="list of counts"):
            parse_counts(bad)
    assert parse_counts("1, 4") == (1, 4)


def test_human_bytes() -> None:
    assert [human_bytes(n) for n in (12, 2048, 5 << 20, 3 << 40)] == ["12 B", "2.0 KiB", "5.0 MiB", "3.0 TiB"]


def test_missing_compiler_is_said_with_the_command(monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path) -> None:
    monkeypatch.setattr(cache, "missing_compile_packages", lambda: ["torch", "apache-tvm"])
    with pytest.raises(MissingExtraError, match=r"torch, apache-tvm are.*pip install 'inferloom\[compile\]'"):
        resolve(tiny_checkpoint)


def test_cache_key_is_content(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The key follows content and options, not the place or the time stamp."""
    import shutil

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options = CompileOptions(dtype="fp32")
    key = content_key(tiny_checkpoint, options)
    copy = Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy", copy_function=shutil.copy))
    assert content_key(copy, options) == key
    assert content_key(copy, CompileOptions(dtype="bf16")) != key
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert content_key(copy, options) != key


def test_every_error_is_known_to_the_command_line() -> None:
    from inferloom import errors

    for name in ("ArtifactError", "RequestError", "UnsupportedError", "VerifyError", "UsageError"):
        assert errors.is_inferloom_error(getattr(errors, name)("what, where, what to do")), name
    assert not errors.is_inferloom_error(ValueError("a bug"))


def test_compile_inspect_run(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                             capsys: pytest.CaptureFixture[str]) -> None:
    """The whole path, and what stands at `-o` is only replaced by --force."""
    out = str(tmp_path / "made")
    assert inferloom(monkeypatch, "compile", str(tiny_checkpoint), "-o", out, "--dtype", "fp32", "--json") == 0
    made = json.loads(capsys.readouterr().out)
    assert made["path"] == out and made["model"]["architecture"] == "LlamaForCausalLM"
    assert inferloom(monkeypatch, "compile", str(tiny_checkpoint), "-o", out) == 1
    assert "--force" in capsys.readouterr().err
    assert inferloom(monkeypatch, "compile", out) == 1
    assert "already compiled" in capsys.readouterr().err
    assert inferloom(monkeypatch, "inspect", out, "--json") == 0
    assert json.loads(capsys.readouterr().out)["contract"]["adds_up"]
    arguments = ("run", out, "hello", "--max-tokens", "4", "--temperature", "1", "--seed", "3", "--json")
    texts = []
    for _ in range(2):
        assert inferloom(monkeypatch, *arguments, "--logprobs", "2") == 0
        shown = json.loads(capsys.readouterr().out)
        texts.append(shown["outputs"][0]["text"])
        assert shown["usage"] == {"prompt_tokens": 5, "completion_tokens": len(shown["outputs"][0]["token_ids"])}
        assert all(len(step) >= 2 for step in shown["outputs"][0]["logprobs"])
    assert texts[0] == texts[1]
    assert inferloom(monkeypatch, *arguments[:-1]) == 0
    assert capsys.readouterr().out == texts[0] + "\n"
    assert inferloom(monkeypatch, "run", out, "x" * 300, "--json") == 1
    assert json.loads(capsys.readouterr().out)["error"]["type"] == "RequestError"
    assert inferloom(monkeypatch, "run", out, "x", "--memory", "1kB") == 1
    assert "weights" in capsys.readouterr().err


def test_chat(tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n\n/reset\nagain\n/exit\nnever\n"))
    assert inferloom(monkeypatch, "chat", str(tiny_artifact), "--max-tokens", "3", "--seed", "1") == 0
    assert capsys.readouterr().out.count("\n") >= 2
