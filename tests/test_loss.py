"""--report-loss: an artifact against the same model in fp32, on a text."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from inferloom import loss
from inferloom.cli.app import app
from inferloom.errors import UsageError
from inferloom.llm import LLM

TEXT = "def f(x):\n    return x + 1\n\n"


def test_an_artifact_loses_nothing_against_itself(tiny_artifact: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.py"
    with LLM(tiny_artifact) as model:
        for times, windows in ((3, 1), (12, 2)):
            path.write_text(TEXT * times)
            found = loss.report_loss(tiny_artifact, tiny_artifact, path)
            assert (found.kl, found.kl_largest, found.agreement) == (0, 0, 1) and found.nats == found.reference_nats
            ids = model.encode(TEXT * times)
            parts = [ids[i : i + 256] for i in range(0, len(ids), 256)]
            want = []
            for part in parts:
                logits = model.logits(part).astype(np.float64)
                p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
                want += [-p[i, token] for i, token in enumerate(part[1:])]
            assert (found.windows, found.predictions) == (windows, len(want))
            assert found.nats == pytest.approx(np.mean(want), rel=1e-9)
            assert found.perplexity == pytest.approx(np.exp(np.mean(want))) and str(path) in str(found)


def test_a_text_without_tokens_is_refused(tiny_artifact: Path, tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("")
    with pytest.raises(UsageError, match="holds no tokens to predict"):
        loss.report_loss(tiny_artifact, tiny_artifact, path)
    path.write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(UsageError, match="cannot be read as a text"):
        loss.report_loss(tiny_artifact, tiny_artifact, path)


@pytest.mark.slow
@pytest.mark.parametrize("quant,lost,kl,agreement", [("none", 0.001, 0.001, 0.99), ("int8", 0.005, 0.005, 0.95),
                                                     ("int4", 0.03, 0.08, 0.8)])
def test_the_demo_model(quant: str, lost: float, kl: float, agreement: float, demo_checkpoint: Path, demo_fp32: Path) -> None:
    result = CliRunner().invoke(app, ["compile", str(demo_checkpoint), "--dtype", "bf16", "--quant", quant, "--report-loss",
                                      "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["loss"]
    assert found["predictions"] > 3000 and 15 < found["reference_perplexity"] < 40
    assert 0 < found["kl"] < kl and abs(found["nats"] - found["reference_nats"]) < lost
    assert found["agreement"] > agreement
