"""The runtime serves without the compiler: nothing of it is imported in a fresh process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

FORBIDDEN = ("torch", "transformers", "triton", "tvm", "tvm_ffi", "ziglang", "inferloom.compiler", "inferloom.ir",
             "inferloom.targets", "inferloom.models")
PROGRAM = """
import json, sys
from inferloom.runtime.llm import LLM
from inferloom.runtime.params import SamplingParams
with LLM(sys.argv[1], threads=1) as llm:
    out = llm.generate("Hello", SamplingParams(max_tokens=2, temperature=0, ignore_eos=True))
print(json.dumps([len(out[0].outputs[0].token_ids), sorted(sys.modules)]))
"""


def test_generating_imports_no_compiler(demo_fp32: Path) -> None:
    run = subprocess.run([sys.executable, "-c", PROGRAM, str(demo_fp32)], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    tokens, modules = json.loads(run.stdout)
    assert tokens == 2
    assert "inferloom.runtime.engine" in modules
    assert [m for m in modules if any(m == f or m.startswith(f + ".") for f in FORBIDDEN)] == []
