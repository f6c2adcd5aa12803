"""Whatever fits the OpenAPI schema, or just not: no answer of 5xx, and every error in OpenAI's shape."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from online_server_helpers import NAME, served_by, service_of
from schemathesis.generation import GenerationMode

from limbeck.online.server import Limits, create_app

PATHS = {
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/models",
    "/v1/models/{model}",
    "/health",
    "/metrics",
    "/",
    "/dashboard.json",
    "/dashboard/pause",
    "/dashboard/resume",
    "/dashboard/update",
    "/dashboard/rollback",
}


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_server_never_fails_on_what_is_sent(stories: tuple[Any, Any], mode: GenerationMode) -> None:
    statuses: dict[str, set[int]] = {}

    def send(case: Any) -> None:
        if isinstance(case.body, dict) and "model" in case.body and mode is GenerationMode.POSITIVE:
            case.body = {**case.body, "model": NAME}  # else few requests come further than that
        answer = case.call(headers={"host": "localhost"})
        statuses.setdefault(case.operation.path, set()).add(answer.status_code)
        assert answer.status_code < 500, answer.text
        if answer.status_code >= 400 and case.operation.method != "head":
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

    def bounded(path: str) -> settings:
        return settings(common, max_examples=50 if path.endswith("completions") else 5)

    common = settings(
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),  # pyright: ignore[reportArgumentType]
    )
    with service_of(stories) as service:
        app = create_app(served_by(stories, service, limits=Limits(max_tokens=8, choices=8)))
        schema = schemathesis.openapi.from_asgi("/openapi.json", app, headers={"host": "localhost"})
        for found in schema.get_all_operations():
            operation = found.ok()  # pyright: ignore[reportAttributeAccessIssue]
            with suppress(Unsatisfiable):  # where nothing is asked for, nothing can be asked for wrongly
                bounded(operation.path)(given(case=operation.as_strategy(generation_mode=mode))(send))()
        assert service.failure is None
    assert set(statuses) <= PATHS and {"/v1/chat/completions", "/v1/completions"} <= set(statuses)
    if mode is GenerationMode.POSITIVE:
        assert set(statuses) == PATHS
        assert 200 in statuses["/v1/completions"] and 200 in statuses["/v1/chat/completions"]
    else:
        assert 400 in statuses["/v1/completions"] and 200 not in statuses["/v1/chat/completions"]
