"""The simple routes, with a real engine on the fake back end behind them: its text can be said beforehand."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from sqlalchemy import text

from domain.catalog import Catalog
from domain.jobs import JobStatus, parse_id
from gpu_worker import intake
from gpu_worker.engine.fake_tokens import fake_text
from storage import tenants
from storage.tables import DEFAULT_TENANT_ID
from tests.conftest import MakeTenant
from tests.integration.api_harness import ApiServer
from tests.integration.runner_harness import Rig
from tests.waiting import wait_until

ROUTES = ["/generate", "/generate_stream", "/api/v1/infer", "/chat"]


@pytest.fixture
def simple(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> Iterator[httpx.Client]:
    """A client of an API whose jobs one worker works off by itself."""
    monkeypatch.setattr(intake, "POLL_SECONDS", 0.01)
    with ApiServer(rig.settings, Catalog.load(rig.settings.models_file)) as server, server.client() as client:
        rig.start()
        yield client


def expected(rig: Rig, prompt: str, request_id: str, num_tokens: int) -> str:
    return fake_text(list(prompt.encode()), rig.job(parse_id(request_id)).seed, 0, num_tokens)


def ask(client: httpx.Client, path: str, **body: Any) -> dict[str, Any]:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return dict(response.json())


def test_generate_continues_one_prompt(simple: httpx.Client, rig: Rig) -> None:
    response = simple.post("/generate", json={"prompt": "Once", "max_tokens": 5, "temperature": 0.5, "seed": 3})
    answer = response.json()
    assert set(answer) == {"text", "request_id", "tokens_generated", "latency_ms", "finish_reason"}
    assert answer["text"] == expected(rig, "Once", answer["request_id"], 5)
    assert (answer["tokens_generated"], answer["finish_reason"]) == (5, "length")
    assert answer["latency_ms"] > 0
    assert response.headers["x-job-id"] == answer["request_id"]
    assert response.headers["x-request-id"].startswith("req_")
    assert simple.get(f"/v1/jobs/{answer['request_id']}").json()["output"]["text"] == answer["text"]
    assert ask(simple, "/generate", inputs="Once", max_tokens=5, seed=3)["text"] == answer["text"]


def test_generate_runs_a_job_for_each_of_several_prompts_in_their_order(simple: httpx.Client, rig: Rig) -> None:
    prompts = [f"Prompt {number}" for number in range(10)]
    results = ask(simple, "/generate", prompts=prompts, max_tokens=4, temperature=0)["results"]
    assert len({result["request_id"] for result in results}) == 10
    for prompt, result in zip(prompts, results, strict=True):
        assert result["text"] == expected(rig, prompt, result["request_id"], 4)
    assert len(ask(simple, "/generate", prompts=["one"], max_tokens=1)["results"]) == 1


def test_generate_stream_brings_tokens_and_then_the_whole(simple: httpx.Client, rig: Rig) -> None:
    response = simple.post("/generate_stream", json={"prompt": "Once", "max_tokens": 12})
    assert response.headers["content-type"].startswith("text/event-stream")
    whole = expected(rig, "Once", response.headers["x-job-id"], 12)
    blocks = [block for block in response.text.split("\n\n") if block]
    *tokens, last = [json.loads(block.removeprefix("data: ")) for block in blocks]
    assert all(set(token) == {"token", "index"} and set(token["token"]) == {"text"} for token in tokens)
    assert "".join(token["token"]["text"] for token in tokens) == whole
    assert tokens[0]["index"] == 0
    assert [token["index"] for token in tokens] == sorted({token["index"] for token in tokens})
    assert last == {"generated_text": whole, "finish_reason": "length", "tokens_generated": 12, "done": True}


def test_chat_answers_with_its_text_alone(simple: httpx.Client) -> None:
    response = simple.post("/chat", json={"prompt": "Hi"})
    assert set(response.json()) == {"text"}
    job = simple.get(f"/v1/jobs/{response.headers['x-job-id']}?include=input").json()
    assert job["usage"]["completion_tokens"] == 100
    assert job["input"]["messages"][0]["content"] == "Hi"


def test_infer_has_exactly_its_fields(simple: httpx.Client, rig: Rig) -> None:
    answer = ask(simple, "/api/v1/infer", prompt="Once", max_tokens=6, temperature=0.7, top_p=0.9)
    assert set(answer) == {"text", "request_id", "latency_ms", "tokens_generated", "cached"}
    assert answer["text"] == expected(rig, "Once", answer["request_id"], 6)
    assert (answer["tokens_generated"], answer["cached"]) == (6, False)


@pytest.mark.parametrize("certainty", [{"temperature": 0}, {"temperature": 0.8, "seed": 5}])
def test_a_deterministic_request_is_answered_by_the_job_that_was_the_same(
    simple: httpx.Client, certainty: dict[str, Any]
) -> None:
    body = {"prompt": "Once", "max_tokens": 6} | certainty
    first, second = ask(simple, "/api/v1/infer", **body), ask(simple, "/api/v1/infer", **body)
    assert (first["cached"], second["cached"]) == (False, True)
    assert (second["text"], second["request_id"]) == (first["text"], first["request_id"])
    others = [body | {"prompt": "Twice"}, body | {"max_tokens": 5}, body | {"top_p": 0.5}, body | {"use_cache": False}]
    assert [ask(simple, "/api/v1/infer", **other)["cached"] for other in others] == [False] * 4


@pytest.mark.parametrize(
    "result",
    [
        "null",
        '{"oops": 1}',
        '{"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 0}}',
        '{"kind": "embedding", "embeddings": [], "dimensions": 1, "usage": {"prompt_tokens": 1}}',
    ],
)
def test_an_answer_that_cannot_be_read_answers_nobody(simple: httpx.Client, rig: Rig, result: str) -> None:
    body = {"prompt": "Once", "max_tokens": 6, "temperature": 0}
    first = ask(simple, "/api/v1/infer", **body)
    with rig.sessions.begin() as session:
        session.execute(text("UPDATE job_results SET result = CAST(:result AS json)"), {"result": result})
    second, third = ask(simple, "/api/v1/infer", **body), ask(simple, "/api/v1/infer", **body)
    assert (second["cached"], third["cached"]) == (False, True)
    assert second["request_id"] == third["request_id"] != first["request_id"]


def test_what_is_left_to_chance_is_never_answered_from_the_cache(simple: httpx.Client) -> None:
    body = {"prompt": "Once", "max_tokens": 6, "temperature": 0.8}
    answers = [ask(simple, "/api/v1/infer", **body) for _ in range(2)]
    assert [answer["cached"] for answer in answers] == [False, False]
    assert answers[0]["request_id"] != answers[1]["request_id"]


def test_nobody_is_answered_from_another_tenants_job(rig: Rig, make_tenant: MakeTenant) -> None:
    with rig.sessions.begin() as session:
        keys = [tenants.create_key(session, tenant) for tenant in (DEFAULT_TENANT_ID, make_tenant().id)]
    settings = rig.settings.model_copy(update={"auth": "api_key"})
    rig.start()
    with ApiServer(settings, Catalog.load(settings.models_file)) as server:
        for key, is_known in [(keys[0], False), (keys[0], True), (keys[1], False)]:
            with server.client(key) as client:
                answer = ask(client, "/api/v1/infer", prompt="Once", max_tokens=2, temperature=0)
                assert answer["cached"] is is_known


def test_a_deleted_job_answers_nobody(simple: httpx.Client) -> None:
    body = {"prompt": "Once", "max_tokens": 2, "temperature": 0}
    simple.delete(f"/v1/jobs/{ask(simple, '/api/v1/infer', **body)['request_id']}")
    assert not ask(simple, "/api/v1/infer", **body)["cached"]


def test_infer_ends_at_its_timeout_and_so_does_its_job(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "POLL_SECONDS", 0.01)
    rig.write_catalog(step_seconds=0.05)
    settings = rig.settings.model_copy(update={"request_timeout_seconds": 0.5, "stream_heartbeat_seconds": 0.1})
    worker = rig.start()
    with ApiServer(settings, Catalog.load(settings.models_file)) as server, server.client() as client:
        late = client.post("/api/v1/infer", json={"prompt": "Once", "max_tokens": 1000})
        assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert late.headers["x-should-retry"] == "false"
        job_id = parse_id(late.headers["x-job-id"])
        wait_until(lambda: worker.ends(job_id))
    assert rig.job(job_id).status is JobStatus.EXPIRED


def test_a_full_queue_is_503_for_infer(rig: Rig) -> None:
    settings = rig.settings.model_copy(update={"max_queued_jobs": 1, "request_timeout_seconds": 2})
    with ApiServer(settings, Catalog.load(settings.models_file)) as server, server.client() as client:
        client.post("/v1/jobs", json={"model": "test-model", "prompt": "x"})
        full = client.post("/api/v1/infer", json={"prompt": "Once"})
        assert (full.status_code, full.json()["error"]["code"]) == (503, "server_is_overloaded")
        assert 1 <= int(full.headers["retry-after"]) <= 60
        assert client.post("/generate", json={"prompt": "Once"}).status_code == 429


def test_many_clients_at_once_are_each_told_their_own(simple: httpx.Client, rig: Rig) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda n: ask(simple, "/generate", prompt=f"Client {n}", max_tokens=6), range(24)))
    for number, answer in enumerate(answers):
        assert answer["text"] == expected(rig, f"Client {number}", answer["request_id"], 6)


# Nobody there


def test_nobody_waits_for_a_model_that_no_worker_serves(rig: Rig) -> None:
    settings = rig.settings.model_copy(update={"no_workers_seconds": 0.1})
    body = {"model": "test-model", "prompt": "Once", "max_tokens": 2}
    with ApiServer(settings, Catalog.load(settings.models_file)) as server, server.client() as client:
        wait_until(lambda: server.services.monitor.unserved_seconds("test-model") > 0.1)
        for path in ("/generate", "/api/v1/infer", "/v1/completions"):
            refused = client.post(path, json=body)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_workers")
            assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert client.post("/v1/jobs", json={"model": "test-model", "prompt": "x"}).status_code == 202
        assert client.get("/health").json()["model_loaded"] is False
        rig.start()
        wait_until(lambda: server.services.monitor.unserved_seconds("test-model") < 0.1)
        assert client.get("/health").json()["model_loaded"] is True


def test_health_tells_how_the_newest_jobs_fared(simple: httpx.Client) -> None:
    empty = simple.get("/health").json()["metrics"]
    assert empty["requests"] == {"total": 0, "errors": 0, "success_rate": None}
    assert empty["latency"] == empty["queue"] == empty["ttft"] == {"p50": None, "p95": None, "p99": None, "mean": None}
    answers = [ask(simple, "/generate", prompt="Once", max_tokens=3) for _ in range(2)]
    metrics = wait_until(lambda: (seen := simple.get("/health").json()["metrics"])["requests"]["total"] == 2 and seen)
    assert metrics["requests"] == {"total": 2, "errors": 0, "success_rate": 1.0}
    assert metrics["throughput"] == {"qps": 2 / metrics["window_seconds"], "tokens_generated": 6}
    mean = sum(answer["latency_ms"] for answer in answers) / 2000
    assert metrics["latency"]["mean"] == pytest.approx(mean, abs=0.001)
    assert metrics["latency"]["p50"] <= metrics["latency"]["p95"] <= metrics["latency"]["p99"]
    assert 0 < metrics["queue"]["mean"] < metrics["ttft"]["mean"] <= metrics["latency"]["mean"]


# Refusals


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperture": 1}, "temperture"),
        ({"max_tokens": -2}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"max_tokens": 5000}, "max_tokens"),
        ({"n": 2}, "n"),
        ({"prompt": 7}, "prompt"),
    ],
)
def test_what_is_wrong_is_named(http: httpx.Client, path: str, fields: dict[str, Any], param: str) -> None:
    refused = http.post(path, json={"prompt": "Hi"} | fields)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("path", ROUTES)
def test_a_prompt_must_be_there(http: httpx.Client, path: str) -> None:
    refused = http.post(path, json={})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "prompt")


@pytest.mark.parametrize(
    "fields", [{"prompt": "a", "inputs": "b"}, {"prompts": []}, {"prompts": ["a"] * 65}, {"prompts": ["a", ""]}]
)
def test_generate_takes_one_kind_of_prompt_and_not_too_many(http: httpx.Client, fields: dict[str, Any]) -> None:
    assert http.post("/generate", json=fields).status_code == 400


def test_an_unknown_model_is_404(http: httpx.Client) -> None:
    refused = http.post("/generate", json={"prompt": "a", "model": "none"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")


NOT_OFFERED = [
    "/v1/audio/transcriptions",
    "/v1/images/generations",
    "/v1/fine_tuning/jobs/ftjob-1/cancel",
    "/v1/moderations",
    "/v1/assistants",
    "/v1/threads/thread_1/runs",
    "/v1/vector_stores",
    "/v1/realtime/sessions",
]


def test_what_is_not_offered_says_so_by_every_method(http: httpx.Client) -> None:
    for path in NOT_OFFERED:
        for method in ("GET", "POST", "DELETE", "PUT", "PATCH"):
            refused = http.request(method, path)
            error = refused.json()["error"]
            assert (refused.status_code, error["code"]) == (501, "not_implemented"), (method, path)
            assert error["message"].startswith("/".join(path.split("/")[:3]))
            assert refused.headers["x-should-retry"] == "false"
