"""Random bodies from our own description: none makes the server fail."""

from __future__ import annotations

from collections import Counter
from typing import Any

import httpx
import pytest

from tests.runtime.server.conftest import Server


def test_every_endpoint_is_described(server: Server) -> None:
    document = httpx.get(server.url + "/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens",
            "/v1/models", "/v1/models/{name}", "/v1/embeddings", "/tokenize", "/detokenize", "/health",
            "/metrics"} <= document["paths"].keys()
    limits = document["components"]["schemas"]["CompletionBody"]["properties"]
    assert limits["n"]["anyOf"][0]["maximum"] == 128


@pytest.mark.slow
def test_no_body_makes_it_fail(server: Server) -> None:
    import schemathesis
    from hypothesis import HealthCheck, given, settings

    schema, seen = schemathesis.openapi.from_url(server.url + "/openapi.json"), Counter[int]()

    def ask(case: Any) -> None:
        if isinstance(case.body, dict):
            for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
                if isinstance(case.body.get(name), int):
                    case.body[name] = min(case.body[name], 8)
        answer = case.call(timeout=60)
        seen[answer.status_code] += 1
        assert answer.status_code < 500, (case.body, answer.text)

    for operation in schema.get_all_operations():
        @settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        @given(case=operation.ok().as_strategy())
        def many(case: Any) -> None:
            ask(case)

        many()
    assert seen[200] > 50 and seen[400] > 50
    assert httpx.get(server.url + "/health").status_code == 200
