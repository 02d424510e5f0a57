"""A process that compiles kernels: one job in JSON a line on stdin, one answer a line on stdout."""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from functools import cache
from types import ModuleType
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

MATRIX = re.compile(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma|v_mfma_|v_wmma_|v_smfmac_")


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints goes to stderr
    for line in sys.stdin:
        try:
            answer = compile_job(json.loads(line))
        except Exception as error:  # the job's own failure; the process goes on
            answer = {"error": f"{type(error).__name__}: {error}"[:4000]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


@cache
def module(path: str) -> ModuleType:
    """The generated file as a module."""
    spec = importlib.util.spec_from_file_location("inferloom_kernels", path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(path)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def compile_job(job: dict[str, Any]) -> dict[str, Any]:
    """Compile one kernel; the fields of `Binary`."""
    chip = job["chip"]
    cuda = chip["driver"] == "cuda"
    target = GPUTarget("cuda", int(chip["arch"][3:]), 32) if cuda else GPUTarget("hip", chip["arch"], chip["warp"])
    attrs: dict[tuple[int], list[list[object]]] = {}
    for i, (name, _) in enumerate(job["parameters"]):
        attrs[(i,)] = [["tt.divisibility", 16]]
        if not cuda and name not in job["wide"]:
            attrs[(i,)].append(["tt.pointer_range", 32])
    fn = getattr(module(job["path"]), job["symbol"])
    source = ASTSource(fn, {name: type for name, type in job["parameters"]}, {}, attrs)
    compiled = triton.compile(source, target=target, options=dict(job["options"]))
    facts = _nvidia(compiled) if cuda else _amd(compiled)
    meta = compiled.metadata
    return {"data": base64.b64encode(compiled.asm["cubin" if cuda else "hsaco"]).decode(),
            "threads": chip["warp"] * meta.num_warps, "shared": meta.shared, "tmem": getattr(meta, "tmem_size", 0) or 0,
            "scratch": (getattr(meta, "global_scratch_size", 0) or 0) + (getattr(meta, "profile_scratch_size", 0) or 0),
            **facts}


def _nvidia(compiled: Any) -> dict[str, Any]:
    ptx = compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        said = subprocess.run([triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name], capture_output=True,
                              text=True, check=True).stdout
    used = {k: int(v) for k, v in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", said)}
    head = ptx[ptx.index(".visible .entry"):]
    sizes = re.findall(r"\.param \.(?:u|b|s)(\d+)", head[:head.index(")")])
    return {"registers": used["REG"], "spilled": used.get("LOCAL", 0), "stack": used["STACK"],
            "matrix": len(MATRIX.findall(ptx)), "parameters": [int(s) // 8 for s in sizes]}


def _amd(compiled: Any) -> dict[str, Any]:
    text = compiled.asm["amdgcn"]

    def figure(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", text)
        return int(found.group(1)) if found else 0

    args = text[text.index(".args:"):text.index(".group_segment_fixed_size:", text.index(".args:"))]
    sizes = [int(size) for kind, size in _amd_args(args) if not kind.startswith("hidden")]
    spilled = 4 * (figure("vgpr_spill_count") + figure("sgpr_spill_count"))
    return {"registers": max(figure("vgpr_count"), figure("agpr_count")), "spilled": spilled,
            "stack": figure("private_segment_fixed_size"), "matrix": len(MATRIX.findall(text)), "parameters": sizes}


def _amd_args(text: str) -> list[tuple[str, str]]:
    made = []
    for entry in re.split(r"\n\s+- ", text):
        size, kind = re.search(r"\.size:\s+(\d+)", entry), re.search(r"\.value_kind:\s+(\w+)", entry)
        if size and kind:
            made.append((kind.group(1), size.group(1)))
    return made


if __name__ == "__main__":
    main()
