"""The figures that the API tells about itself."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from api_server import FakeEngine, body, figures, finish, http, post, served


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


def test_metrics_count_what_was_done(url: str, engine: FakeEngine, pool: ThreadPoolExecutor) -> None:
    for number, values in enumerate((body(), body(model="second"), body(stream=True)), start=1):
        reply = pool.submit(post, url, values)
        pending = engine.asked(number)
        assert figures(url)["querybridge_requests_waiting"] == 1
        assert figures(url)["querybridge_requests_in_flight"] == 2  # the one that asks for the figures among them
        pending._update("re")
        time.sleep(0.3)
        finish(pending, tokens=5)
        assert reply.result().status_code == 200
    post(url, [])
    with http(url) as client:
        client.get("/no/such/path")
        client.get("/v1/models/first")
    found = figures(url)

    assert found['querybridge_requests_total{endpoint="/v1/chat/completions",status="200"}'] == 3
    assert found['querybridge_requests_total{endpoint="/v1/chat/completions",status="400"}'] == 1
    assert found['querybridge_requests_total{endpoint="/v1/models/{name:path}",status="200"}'] == 1
    assert found['querybridge_requests_total{endpoint="other",status="404"}'] == 1
    assert found['querybridge_generated_tokens_total{adapter="first"}'] == 10
    assert found['querybridge_generated_tokens_total{adapter="second"}'] == 5
    assert found['querybridge_prompt_tokens_total{adapter="first"}'] == 14
    assert found['querybridge_answer_seconds_count{adapter="first"}'] == 2
    assert found['querybridge_answer_seconds_sum{adapter="first"}'] >= 0.6
    first_token = found['querybridge_first_token_seconds_sum{adapter="first"}']
    assert first_token <= found['querybridge_answer_seconds_sum{adapter="first"}'] - 0.5
    assert found["querybridge_requests_waiting"] == 0


def test_two_servers_in_one_process_count_apart(engine: FakeEngine) -> None:
    with served(engine) as first, served(FakeEngine()) as second:
        post(first, [])
        name = 'querybridge_requests_total{endpoint="/v1/chat/completions",status="400"}'

        assert figures(first)[name] == 1
        assert name not in figures(second)


def test_health_names_the_adapters(url: str) -> None:
    with http(url) as client:
        assert client.head("/health").status_code == 200  # what some load balancers ask
        found = client.get("/health").json()

    assert found["status"] == "ok"
    assert found["adapters"] == ["first", "second"]
    assert found["version"].count(".") == 2
