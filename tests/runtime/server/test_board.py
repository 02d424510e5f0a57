"""The Grafana board asks for metrics that there are."""

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx

from tests.runtime.server.conftest import Server

BOARD = json.loads((Path(__file__).resolve().parents[3] / "docs" / "grafana.json").read_text())


def test_every_metric_of_the_board_is_there(server: Server) -> None:
    httpx.post(server.url + "/v1/completions", json={"prompt": "import", "max_tokens": 2}).raise_for_status()
    lines = httpx.get(server.url + "/metrics").text.splitlines()
    there: dict[str, set[str]] = {}
    for line in lines:
        if line and not line.startswith("#"):
            name, _, rest = line.partition("{")
            there.setdefault(name, set()).update(re.findall(r'(\w+)="', rest))
    for panel in BOARD["panels"]:
        for target in panel["targets"]:
            asked = re.findall(r"(?:by \(([^)]*)\) \()?(?:(?:rate|increase)\()?(inferloom_\w+)(\{model_name)?", target["expr"])
            assert asked, target
            for by, name, filtered in asked:
                labels = {label.strip() for label in by.split(",") if label} | ({"model_name"} if filtered else set())
                assert name in there and labels <= there[name], (panel["title"], name, labels)
            for label in re.findall(r"{{(\w+)}}", target["legendFormat"]):
                assert any(label in there[name] for _, name, _ in asked), (panel["title"], label)
    blocks = [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("inferloom_kv_blocks_owned{")]
    total = next(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("inferloom_kv_blocks{"))
    assert len(blocks) == 4 and sum(blocks) == total > 0


def test_panels_lie_beside_each_other() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24 and not cells & taken, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])
