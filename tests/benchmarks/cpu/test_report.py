"""Medians, ratios, targets, tables: all from lines that are written here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from inferloom.benchmarks.cpu import report
from inferloom.errors import InferloomError

CEILINGS = {"bw_4k": 20.0, "bw_huge": 25.0, "fp32": 200.0, "bf16": 400.0, "int8": 800.0}
MACHINE = {"machine": {"cpu": "CPU", "system": "Linux"}, "threads": 2, "date": "2026-01-01"}


def line(system: str, number: int, measured: dict[str, float], others: float = 0.0, precision: str = "bf16",
         model: str = "qwen2.5-0.5b", scale: float = 1.0) -> dict[str, Any]:
    """A process's outcome, with 1 GB of weights, 1 GFLOP a token and 0.5 a row; `scale` is of the machine's speed."""
    ceilings = {name: value * scale for name, value in CEILINGS.items()}
    return {"key": f"{system} {number}", "kind": f"{model} {precision} {system} {'+'.join(measured)}", "model": model,
            "precision": precision, "system": system, "round": number, "time": "2026-01-01T00:00:00Z", "format": "f",
            "flops_per_token": 10**9, "flops_per_row": 5 * 10**8, "weight_bytes": 10**9, "threads": 2,
            "state_bytes_per_token": 10**4, "before": ceilings, "after": ceilings, "status": 0, "seconds": 1, "said": "",
            "lines": [{"metric": m, "value": v, "unit": "s" if m == "load" else "tok/s", "others": others, "version": "v 1"}
                      for m, v in measured.items()]}


def cell(made: dict[str, Any], system: str, metric: str) -> dict[str, Any]:
    return next(c for c in made["cells"] if (c["system"], c["metric"]) == (system, metric))


def test_medians_leave_out_what_others_disturbed() -> None:
    runs = [line("inferloom", i, {"decode_1": v}, others) for i, (v, others) in
            enumerate([(20.0, 0.0), (5.0, 0.5), (22.0, 0.01), (21.0, 0.0)])]
    made = cell(report.summarize(runs), "inferloom", "decode_1")
    assert made["value"] == 21.0 and made["runs"] == [20.0, 22.0, 21.0] and not made["disturbed"]
    worst = cell(report.summarize(runs[1:2]), "inferloom", "decode_1")
    assert worst["value"] == 5.0 and worst["disturbed"] and worst["others"] == 0.5


def test_ratios_are_to_the_ceilings_of_the_same_process() -> None:
    """The machine was twice as fast in the second round, and so was the engine: the ratio is the same."""
    slow, fast = line("inferloom", 0, {"decode_1": 20.0}), line("inferloom", 1, {"decode_1": 40.0}, scale=2.0)
    for lines in ([slow], [fast], [slow, fast]):
        made = cell(report.summarize(lines), "inferloom", "decode_1")
        assert made["ratio"] == pytest.approx(20 * 1.0 / 25) and made["ratio_4k"] == pytest.approx(20 * 1.0 / 20)


def test_ceilings_around_a_metric_are_closer_than_those_of_its_process() -> None:
    one = line("inferloom", 0, {"decode_1": 20.0})
    one["lines"][0]["ceilings"] = {name: 2 * value for name, value in CEILINGS.items()}
    assert cell(report.summarize([one]), "inferloom", "decode_1")["ratio"] == pytest.approx(20 * 1.0 / 50)


@pytest.mark.parametrize("metric,value,precision,seconds", [
    ("decode_1", 10.0, "bf16", 0.04),  # 1 GB at 25 GB/s; computing 1.5 GFLOP takes 4 ms
    ("prefill_512", 100.0, "bf16", (512 + 0.5) / 400 / 512),
    ("prefill_512", 100.0, "int8", (512 + 0.5) / 800 / 512),
    ("prefill_512", 100.0, "int4", (512 + 0.5) / 800 / 512),
    # Prompts, then 127 steps of 16 rows: 24 GFLOP take 60 ms, and reading takes 40.
    ("requests_16", 100.0, "bf16", ((2048 + 8) / 400 + 127 * 0.06) / 2048),
    ("context_8192", 40.0, "bf16", (1e9 + 4 * 8192 * 1e4) / 25e9 / 4),
])
def test_ratio(metric: str, value: float, precision: str, seconds: float) -> None:
    """`seconds`: the least that a token takes."""
    got = report.ratio(metric, value, precision, CEILINGS, line("inferloom", 0, {}))
    assert got == pytest.approx(value * seconds)


def test_peaks_fall_back_to_what_the_processor_has() -> None:
    assert report.peak("bf16", {"fp32": 1.0}) == 1.0 and report.peak("int8", {"fp32": 1.0, "int8": 2.0}) == 2.0


def test_the_best_sane_peer_counts() -> None:
    lines = [line(name, 0, {"decode_1": speed, "load": seconds}) for name, speed, seconds in
             (("inferloom", 30.0, 1.0), ("llama.cpp", 20.0, 2.0), ("openvino", 25.0, 3.0), ("vllm", 90.0, 0.1))]
    scores = {lines[3]["kind"]: {"mean": 1.0, "largest": 1.2, "tokens": 8, "sane": False}}
    made = report.summarize(lines, scores)
    ours = cell(made, "inferloom", "decode_1")
    assert ours["best_peer"] == "openvino" and ours["of_peer"] == pytest.approx(1.2)
    assert cell(made, "inferloom", "load")["of_peer"] == pytest.approx(2.0)  # of llama.cpp's seconds
    assert "~~90.0" in report.table(made, "qwen2.5-0.5b")


def test_targets_say_by_how_much() -> None:
    lines = [line("inferloom", 0, {"decode_1": 20.0}), line("llama.cpp", 0, {"decode_1": 10.0})]
    made = {(t["metric"], t["precision"], t["against"]): t for t in report.summarize(lines)["targets"]}
    ceiling = made["decode_1", "bf16", "ceiling"]
    assert ceiling["wanted"] == 0.90 and ceiling["share"] == pytest.approx(0.8 / 0.9)
    assert made["decode_1", "bf16", "best peer"]["share"] == pytest.approx(2 / 1.1)
    assert made["decode_1", "int8", "ceiling"]["reached"] is None
    text = report.markdown(MACHINE | report.summarize(lines))
    assert "missed by 11%" in text and "best peer (llama.cpp)" in text and "not measured" in text


def test_a_bound_in_seconds() -> None:
    lines = [line("inferloom", 0, {"load": 1.25}, precision="int8", model="llama-3.2-1b")]
    bound = next(t for t in report.summarize(lines)["targets"] if t["against"] == "bound")
    assert bound["reached"] == 1.25 and bound["share"] == pytest.approx(0.8)


def test_what_failed_is_said() -> None:
    bad = line("vllm", 0, {}) | {"status": 1, "said": "no such operator"}
    gone = {"key": "k", "kind": "k", "model": "qwen2.5-0.5b", "precision": "int8", "system": "openvino", "round": 0,
            "time": "", "missing": "not installed"}
    made = report.summarize([bad, gone, line("inferloom", 0, {"decode_1": 1.0})])
    assert made["missing"] == {bad["kind"]: "no such operator", "qwen2.5-0.5b int8 openvino": "not installed"}
    assert report.summarize([bad, line("vllm", 0, {})])["missing"] == {}  # a later try did it


def test_readme_is_filled_between_its_markers(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    for _ in range(2):
        report.fill(readme, "| a \\1 |\n")
        assert readme.read_text() == f"before\n{report.BEGIN}\n| a \\1 |\n{report.END}\nafter\n"
    readme.write_text("no markers")
    with pytest.raises(InferloomError, match="must have one line"):
        report.fill(readme, "x")


def test_the_report_is_written(tmp_path: Path) -> None:
    lines = [line("inferloom", 0, {"decode_1": 23.0, "load": 1.0}), line("llama.cpp", 0, {"load": 20.0})]
    made = MACHINE | report.summarize(lines)
    report.write(made, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "**Qwen2.5-0.5B shape**" in text and "| bf16 | **inferloom** | 23.0 (92%) | 1.00 |" in text
    assert "qwen2.5-0.5b.svg" not in text or (tmp_path / "out" / "qwen2.5-0.5b.svg").stat().st_size > 1000
    assert "Targets: 1 of 13 reached" in report.short(made, "results")
