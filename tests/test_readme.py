"""The README's commands and programs run as they are written, one after the other, in one folder."""

from __future__ import annotations

import doctest
import os
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(((?!https?:)[^)#]+)")


def blocks() -> list[tuple[str, str]]:
    return [(kind, text) for kind, text in BLOCK.findall((ROOT / "README.md").read_text())
            if kind in ("console", "python")]


def run(command: list[str], folder: Path) -> str:
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder that has `models/`, as the checkout does."""
    made = tmp_path_factory.mktemp("readme")
    (made / "models").symlink_to(ROOT / "models")
    return made


def test_readme_has_something_to_run() -> None:
    assert {kind for kind, _ in blocks()} == {"console", "python"}


@pytest.mark.parametrize("kind,text", blocks(), ids=lambda value: value.split("\n")[0][:40])
def test_block(kind: str, text: str, folder: Path) -> None:
    if kind == "python":
        assert run([sys.executable, "-c", text], folder).strip()
    else:
        for line in text.splitlines():
            assert line.startswith("$ "), f"a console block holds commands only: {line!r}"
            assert run(shlex.split(line[2:]), folder).strip()


def test_the_pass_in_the_docs_works() -> None:
    """The first program of add-a-pass.md is a module whose docstring is a doctest."""
    (text, *_) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "add-a-pass.md").read_text(), re.DOTALL)
    module = types.ModuleType("documented_pass")
    code = compile(text, "docs/add-a-pass.md", "exec")
    types.FunctionType(code, vars(module))()
    assert doctest.testmod(module) == (0, 3)


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    broken = [link for link in LINK.findall(page.read_text()) if not (page.parent / link).exists()]
    assert broken == []


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
def test_example(example: Path, demo_bf16: Path, tmp_path: Path) -> None:
    assert run([sys.executable, str(example), str(demo_bf16)], tmp_path).strip()


def test_examples_are_listed() -> None:
    listed = set(re.findall(r"`(\w+\.py)`", (ROOT / "examples" / "README.md").read_text()))
    assert listed == {p.name for p in (ROOT / "examples").glob("*.py")}
