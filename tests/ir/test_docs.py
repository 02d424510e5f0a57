"""docs/ops.md is made from the declarations."""

from __future__ import annotations

from pathlib import Path

import pytest

from inferloom.ir import op as ops
from inferloom.ir.docs import main, render

PAGE = Path(__file__).resolve().parents[2] / "docs" / "ops.md"


def test_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(), "run `python -m inferloom.ir.docs`"


def test_every_op_is_there_with_its_attributes_and_a_docstring() -> None:
    page = render()
    for name, op in ops.all_ops().items():
        assert op.doc, f"{name} has no docstring"
        section = page.split(f"### `{name}`\n", 1)[1].split("\n### ")[0]
        assert op.doc in section
        assert all(f"attribute `{a}`" in section for a in op.attrs)


def test_check_and_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "ops.md"
    assert main(["--check", str(page)]) == 1 and "is out of date" in capsys.readouterr().err
    assert main([str(page)]) == 0 and main(["--check", str(page)]) == 0
    page.write_text(page.read_text(encoding="utf-8") + " ", encoding="utf-8")
    assert main(["--check", str(page)]) == 1
    assert main(["-"]) == 0 and capsys.readouterr().out == render()
