"""Promises about the code itself: who imports what, and that nothing executes what it reads."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("inferloom", "ir", "compiler", "targets", "runtime", "models")
HEAVY = ("torch", "transformers", "triton", "tvm", "tvm_ffi", "ml_dtypes", "safetensors",
         "inferloom.compiler", "inferloom.ir", "inferloom.targets", "inferloom.models")
UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = {"torch.load", "eval", "exec", "builtins.eval", "builtins.exec", "yaml.load", "yaml.unsafe_load"}
UNSAFE_KEYWORDS = {"trust_remote_code", "allow_pickle"}


def sources(*folders: str) -> list[Path]:
    return sorted(p for folder in folders for p in (ROOT / folder).rglob("*.py"))


def loaded_modules(code: str) -> set[str]:
    """Names in `sys.modules` of a fresh process that ran `code`, started outside the checkout."""
    program = f"import sys\n{code}\nimport json; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd="/", check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("code", [
    "import inferloom",
    "import inferloom.runtime.llm",
    "from inferloom import LLM, AsyncLLM, SamplingParams, InferloomError",
    "import inferloom.cli",
])
def test_runtime_process_imports_no_compiler(code: str) -> None:
    modules = loaded_modules(code)
    assert [m for m in modules for heavy in HEAVY if m == heavy or m.startswith(heavy + ".")] == []


def test_importing_the_face_is_light() -> None:
    """`import inferloom` alone loads neither NumPy nor the runtime."""
    modules = loaded_modules("import inferloom")
    assert {m for m in modules if m.startswith("inferloom.")} == set()
    assert "numpy" not in modules


def unsafe_uses(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [f"{node.lineno}: import {a.name}" for a in node.names if a.name.split(".")[0] in UNSAFE_MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in UNSAFE_MODULES:
            found.append(f"{node.lineno}: from {node.module} import")
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in UNSAFE_CALLS:
                found.append(f"{node.lineno}: {name}(...)")
            found += [f"{node.lineno}: {k.arg}=..." for k in node.keywords
                      if k.arg in UNSAFE_KEYWORDS and not (isinstance(k.value, ast.Constant) and not k.value.value)]
    return found


@pytest.mark.parametrize("path", sources(*FOLDERS), ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_executes_what_it_reads(path: Path) -> None:
    """No pickle in any form, no `torch.load`, no remote code, no `eval` or `exec`."""
    assert unsafe_uses(ast.parse(path.read_text())) == []


@pytest.mark.parametrize("code", ["import pickle", "from cloudpickle import dumps", "torch.load(f)", "eval(text)",
                                  "load(path, trust_remote_code=True)", "np.load(f, allow_pickle=flag)"])
def test_the_check_finds_what_it_should(code: str) -> None:
    assert len(unsafe_uses(ast.parse(code))) == 1


def test_every_source_file_is_in_a_package() -> None:
    """setup.py finds packages by `__init__.py`; a folder without one would be missing from the wheel."""
    lost = {p.parent for p in sources(*FOLDERS) if not (p.parent / "__init__.py").exists()}
    assert lost == set()


def test_data_files_are_in_the_wheel() -> None:
    """Everything that is not Python below the packages matches a pattern of package-data (the demo's aside)."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["*"]
    skipped = {ROOT / "models" / "demo"}
    files = [p for folder in FOLDERS for p in (ROOT / folder).rglob("*")
             if p.is_file() and p.suffix not in (".py", ".pyc", ".md") and p.parent not in skipped]
    assert [p for p in files if not any(p.match(pattern) for pattern in patterns)] == []


def test_base_install_is_thin() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {d.split(">")[0].split("=")[0] for d in project["dependencies"]}
    assert names == {"numpy", "blake3", "tokenizers", "jinja2", "typer", "rich"}
