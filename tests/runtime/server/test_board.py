"""The Grafana board asks for metrics that there are."""

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx
import pytest

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


def test_it_is_a_board_that_grafana_takes() -> None:
    """What Grafana 10 needs of a dashboard (https://grafana.com/docs/grafana/latest/visualizations/dashboards/build-dashboards/
    view-dashboard-json-model/): kinds of panels that it brings, their place, and where each query goes."""
    assert BOARD["schemaVersion"] >= 36 and BOARD["title"] and re.fullmatch(r"[A-Za-z0-9_-]{1,40}", BOARD["uid"])
    assert BOARD.get("id") is None and "__inputs" not in BOARD, "a data source is chosen by a variable, not when it is imported"
    assert BOARD["time"].keys() == {"from", "to"}
    variables = {v["name"]: v for v in BOARD["templating"]["list"]}
    source = {"type": "prometheus", "uid": "${datasource}"}
    assert variables["datasource"]["type"] == "datasource" and variables["datasource"]["query"] == source["type"]
    assert variables["model"]["type"] == "query" and variables["model"]["datasource"] == source
    for panel in BOARD["panels"]:
        assert panel["type"] in ("stat", "timeseries", "gauge", "bargauge", "heatmap", "table", "text", "row"), panel["title"]
        assert panel["title"] and type(panel["id"]) is int and panel["datasource"] == source
        at = panel["gridPos"]
        assert at.keys() == {"x", "y", "w", "h"} and all(type(n) is int for n in at.values()), panel["title"]
        assert at["x"] >= 0 and at["y"] >= 0 and at["w"] >= 1 and at["h"] >= 1
        assert panel["targets"] and panel["fieldConfig"]["defaults"]
        refs = [target["refId"] for target in panel["targets"]]
        assert len(set(refs)) == len(refs), panel["title"]
        assert all(target["datasource"] == source for target in panel["targets"]), panel["title"]
    used = set(re.findall(r"\$(?:\{(\w+)\}|(\w+))", json.dumps(BOARD["panels"])))
    assert {a or b for a, b in used} <= {*variables, "__rate_interval", "__range", "__interval"}


def test_its_queries_are_promql() -> None:
    promql = pytest.importorskip("promql_parser", reason="needs the package promql-parser, of the extra test")
    with pytest.raises(ValueError):
        promql.parse("sum(rate(x[5m])")
    for panel in BOARD["panels"]:
        for target in panel["targets"]:
            promql.parse(target["expr"].replace("$__rate_interval", "1m"))
