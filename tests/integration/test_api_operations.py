"""The API as an operator meets it: health, metrics, the queue, a database or Redis that is away, and the end."""

import logging
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from uuid import uuid4

import httpx
import pytest
from sqlalchemy import make_url, text
from sqlalchemy.orm import Session, sessionmaker

from local.servers import EmbeddedPostgres, EmbeddedRedis
from metrics import Process, registries
from settings import ROOT
from storage import workers
from storage.database import migrate
from storage.workers import WorkerReport
from tests.integration.api_harness import MODEL, ApiServer, HandWorker, all_events, body, open_events, post_job
from tests.waiting import slowness, wait_until


def beat(session_factory: sessionmaker[Session], **fields: object) -> None:
    report = {"id": uuid4(), "hostname": "w1", "model": MODEL, "max_num_seqs": 4, "num_running": 0}
    with session_factory.begin() as session:
        workers.heartbeat(session, WorkerReport(**{**report, "tokens_per_second": 20.0, **fields}))  # type: ignore[arg-type]


def queue_of(http: httpx.Client, model: str = MODEL) -> dict[str, object]:
    return next(dict(queue) for queue in http.get("/v1/queue").json()["data"] if queue["model"] == model)


def test_the_queue_tells_what_waits_what_runs_and_how_soon(
    http: httpx.Client, hand_worker: HandWorker, session_factory: sessionmaker[Session]
) -> None:
    assert queue_of(http)["eta_seconds"] is None
    beat(session_factory, max_num_seqs=1)
    jobs = [post_job(http) for _ in range(4)]  # of 5 prompt tokens and 16 to come each
    hand_worker.claim(jobs[0]["id"])
    queue = wait_until(lambda: (seen := queue_of(http))["running"] == 1 and seen["workers"] == 1 and seen)
    assert (queue["queued"], queue["running"], queue["workers"], queue["slots"]) == (3, 1, 1, 1)
    assert queue["tokens_ahead"] == 3 * 21 + 16
    assert queue["tokens_per_second"] == 20.0
    assert queue["oldest_queued_seconds"] > 0
    assert 0 < queue["eta_seconds"] <= 79 / 20
    by_tenant = http.get("/v1/admin/queue").json()
    [own] = by_tenant["data"]
    assert (own["model"], own["tenant"], own["queued"], own["running"]) == (MODEL, "default", 3, 1)
    assert own["oldest_queued_seconds"] > 0
    assert 0 < own["eta_seconds"] <= 79 / 20
    assert by_tenant["has_more"] is False


def test_a_job_knows_its_place_and_the_place_moves_up(
    http: httpx.Client, api: ApiServer, hand_worker: HandWorker, session_factory: sessionmaker[Session]
) -> None:
    beat(session_factory, max_num_seqs=1)
    wait_until(lambda: queue_of(http)["workers"] == 1)
    hand_worker.claim(post_job(http)["id"])
    ahead, mine = post_job(http)["id"], post_job(http)["id"]
    first = post_job(http, priority=5)["id"]
    with open_events(http, mine) as events, api.client() as other:
        assert next(events).data["position"] == 2
        other.delete(f"/v1/jobs/{first}")
        moved = next(events)
        assert (moved.name, moved.data["position"]) == ("job.queued", 1)
        assert moved.data["eta_seconds"] is not None
        other.post(f"/v1/jobs/{ahead}/cancel")
        assert next(events).data["position"] == 0
        seen = other.get(f"/v1/jobs/{mine}")
        assert seen.json()["queue"]["position"] == 0
        assert seen.headers["x-queue-position"] == "0"


def test_a_job_with_a_free_slot_starts_at_once(http: httpx.Client, session_factory: sessionmaker[Session]) -> None:
    beat(session_factory, max_num_seqs=2)
    wait_until(lambda: queue_of(http)["workers"] == 1)
    seen = post_job(http)["queue"]
    assert (seen["position"], seen["eta_seconds"], seen["waiting_for"], seen["is_estimate"]) == (0, 0.0, "slots", False)


def test_health_tells_the_whole_and_what_is_missing(
    http: httpx.Client, session_factory: sessionmaker[Session], redis_server: EmbeddedRedis
) -> None:
    health = http.get("/health").json()
    assert (health["status"], health["database"], health["redis"]) == ("degraded", "ok", "ok")
    assert health["workers"] == 0
    assert [reason.split(":")[0] for reason in health["reasons"]] == ["no worker is ready"]
    beat(session_factory)
    wait_until(lambda: http.get("/health").json()["status"] == "ok")
    assert http.get("/health").json()["reasons"] == []
    redis_server.stop()
    try:
        wait_until(lambda: http.get("/health").json()["status"] == "degraded")
        health = http.get("/health")
        assert health.status_code == 200
        assert health.json()["redis"] == "unavailable"
        assert "Redis gives no connection" in health.json()["reasons"][0]
        assert http.get("/health/ready").status_code == 200
        assert http.post("/v1/jobs", json=body()).status_code == 202
    finally:
        redis_server.start()


def test_metrics_hold_the_names_that_dashboards_read(http: httpx.Client) -> None:
    post_job(http, prompt="my diary entry")
    http.get("/nowhere/my-diary")
    wait_until(lambda: 'celeriac_jobs_queued{model="fake",reason="worker"} 1.0' in http.get("/metrics").text)
    metrics = http.get("/metrics").text
    assert 'celeriac_submitted_prompt_tokens_total{model="fake"}' in metrics
    assert 'celeriac_jobs_submitted_total{model="fake",outcome="accepted"}' in metrics
    assert 'celeriac_http_requests_total{method="POST",route="/v1/jobs",status="202"}' in metrics
    assert 'route="unmatched",status="404"' in metrics
    assert "diary" not in metrics


def test_prompts_and_keys_stay_out_of_the_logs(http: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        post_job(http, prompt="my diary entry", metadata={"a": "my diary entry"})
        http.post("/v1/jobs", json=body(prompt="my diary entry", params={"temperature": 9}))
        http.get("/v1/jobs", headers={"authorization": "Bearer my diary entry"})
    assert "my diary" not in "\n".join(record.getMessage() + str(record.__dict__) for record in caplog.records)


def test_the_published_schema_knows_every_route(http: httpx.Client) -> None:
    schema = http.get("/openapi.json").json()
    assert set(schema["paths"]) == {
        "/api/v1/infer",
        "/chat",
        "/detokenize",
        "/generate",
        "/generate_stream",
        "/health",
        "/health/live",
        "/health/ready",
        "/metrics",
        "/ping",
        "/rerank",
        "/score",
        "/tokenize",
        "/v1/admin/audit",
        "/v1/admin/keys",
        "/v1/admin/keys/{key_id}",
        "/v1/admin/keys/{key_id}/rotate",
        "/v1/admin/models",
        "/v1/admin/models/known",
        "/v1/admin/models/pulls",
        "/v1/admin/models/pulls/{name}",
        "/v1/admin/models/pulls/{name}/cancel",
        "/v1/admin/models/{model}/load",
        "/v1/admin/models/{model}/unload",
        "/v1/admin/queue",
        "/v1/admin/tenants",
        "/v1/admin/tenants/{tenant}",
        "/v1/admin/tenants/{tenant}/erasures",
        "/v1/admin/tenants/{tenant}/erasures/{erasure_id}",
        "/v1/admin/workers/{hostname}/drain",
        "/v1/admin/workers/{hostname}/resume",
        "/v1/batches",
        "/v1/batches/{batch_id}",
        "/v1/batches/{batch_id}/cancel",
        "/v1/chat/completions",
        "/v1/chat/completions/{completion_id}",
        "/v1/chat/completions/{completion_id}/messages",
        "/v1/completions",
        "/v1/conversations",
        "/v1/conversations/{conversation_id}",
        "/v1/conversations/{conversation_id}/items",
        "/v1/conversations/{conversation_id}/items/{item_id}",
        "/v1/dead_letters",
        "/v1/dead_letters/{job_id}/replay",
        "/v1/embeddings",
        "/v1/files",
        "/v1/files/{file_id}",
        "/v1/files/{file_id}/content",
        "/v1/jobs",
        "/v1/jobs/{job_id}",
        "/v1/jobs/{job_id}/cancel",
        "/v1/jobs/{job_id}/events",
        "/v1/jobs/{job_id}/output",
        "/v1/jobs/{job_id}/retry",
        "/v1/jobs/{job_id}/stream",
        "/v1/jobs/{job_id}/stream_token",
        "/v1/key",
        "/v1/limits",
        "/v1/messages",
        "/v1/messages/batches",
        "/v1/messages/batches/{message_batch_id}",
        "/v1/messages/batches/{message_batch_id}/cancel",
        "/v1/messages/batches/{message_batch_id}/results",
        "/v1/messages/count_tokens",
        "/v1/models",
        "/v1/models/{model}",
        "/v1/organization/usage/completions",
        "/v1/organization/usage/embeddings",
        "/v1/queue",
        "/v1/rerank",
        "/v1/responses",
        "/v1/responses/compact",
        "/v1/responses/input_tokens",
        "/v1/responses/{response_id}",
        "/v1/responses/{response_id}/cancel",
        "/v1/responses/{response_id}/input_items",
        "/v1/score",
        "/v1/usage",
        "/v1/webhook_deliveries",
        "/v1/webhook_deliveries/{delivery_id}",
        "/v1/webhook_deliveries/{delivery_id}/redeliver",
        "/v1/webhook_endpoints",
        "/v1/webhook_endpoints/{webhook_endpoint_id}",
        "/v1/webhook_endpoints/{webhook_endpoint_id}/rotate_secret",
        "/v1/webhook_endpoints/{webhook_endpoint_id}/test",
        "/v1/webhook_event_types",
        "/v1/webhook_secret",
        "/v1/webhook_secret/rotate_secret",
        "/v2/rerank",
        "/version",
    }
    content = schema["paths"]["/v1/jobs"]["post"]["requestBody"]["content"]["application/json"]
    assert {"$ref": "#/components/schemas/JobBody"} in content["schema"]["anyOf"]
    assert "priority" in schema["components"]["schemas"]["JobBody"]["properties"]
    assert {parameter["name"] for parameter in schema["paths"]["/v1/jobs"]["get"]["parameters"]} >= {"status", "after"}
    assert http.get("/docs").status_code == 200


def test_the_api_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, api.app, api.server; "
        "print([name for name in sys.modules if name.split('.')[0] in ('torch', 'transformers', 'celery', 'numpy')])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# The database away


@pytest.fixture(scope="module")
def own_server(server_folder: Path) -> Iterator[EmbeddedPostgres]:
    with EmbeddedPostgres(server_folder / "api-postgres", settings={"fsync": "off"}) as server:
        migrate(server.url)
        yield server


class TestWithoutDatabase:
    """On a server of its own, which may be stopped."""

    @pytest.fixture
    def database_url(self, own_server: EmbeddedPostgres) -> str:
        own_server.start()
        return own_server.url

    def test_submissions_are_refused_while_it_is_away_and_accepted_after(
        self, http: httpx.Client, own_server: EmbeddedPostgres
    ) -> None:
        before = post_job(http)["id"]
        own_server.stop()
        try:
            for method, path in [("POST", "/v1/jobs"), ("GET", f"/v1/jobs/{before}"), ("GET", "/v1/jobs")]:
                refused = http.request(method, path, json=body() if method == "POST" else None)
                assert (refused.status_code, refused.json()["error"]["code"]) == (503, "storage_unavailable")
                assert 1 <= int(refused.headers["retry-after"]) <= 60
                assert refused.elapsed.total_seconds() < 5 * slowness()
            assert http.get("/health/ready").status_code == 503
            wait_until(lambda: http.get("/health").status_code == 503)  # it may show what was seen a moment before
            assert http.get("/health/live").status_code == 200
        finally:
            own_server.start()
        after = post_job(http)["id"]
        assert [job["id"] for job in http.get("/v1/jobs").json()["data"]] == [after, before]
        wait_until(lambda: http.get("/health/ready").status_code == 200)

    def test_a_stream_outlives_a_restart_of_it(
        self, http: httpx.Client, hand_worker: HandWorker, own_server: EmbeddedPostgres
    ) -> None:
        job_id = post_job(http)["id"]
        with open_events(http, job_id) as events:
            assert next(events).name == "job.queued"
            job = hand_worker.claim(job_id)
            hand_worker.say(job, "before")
            own_server.stop()
            own_server.start()
            hand_worker.say(job, "after", first=2)
            hand_worker.finish(job, "before", "after")
            rest = list(events)
        assert [event.data["text"] for event in rest if event.name == "output.delta"] == ["before", "after"]
        assert rest[-1].name == "job.completed"


def test_lost_connections_are_noticed_by_nobody(
    http: httpx.Client, session_factory: sessionmaker[Session], database_url: str
) -> None:
    """A restart of the database, or a firewall's silence, leaves dead connections in every pool."""
    name = make_url(database_url).database
    others = "FROM pg_stat_activity WHERE datname = :name AND usename = current_user AND pid <> pg_backend_pid()"
    for method, path in [("POST", "/v1/jobs"), ("GET", "/v1/jobs"), ("GET", "/v1/queue"), ("POST", "/v1/jobs")]:
        with session_factory() as session:
            session.execute(text(f"SELECT pg_terminate_backend(pid) {others}"), {"name": name})
        response = http.request(method, path, json=body() if method == "POST" else None)
        assert response.is_success, response.text


# The end


def test_streams_and_long_polls_end_when_the_server_stops_and_go_on_elsewhere(
    api: ApiServer, http: httpx.Client, hand_worker: HandWorker
) -> None:
    job_id = post_job(http)["id"]
    job = hand_worker.claim(job_id)
    hand_worker.say(job, "a")
    answers: list[httpx.Response] = []
    waiting = threading.Thread(target=lambda: answers.append(http.get(f"/v1/jobs/{job_id}", params={"wait": 60})))
    with open_events(http, job_id) as events, ApiServer(api.services.settings) as other:
        assert next(events).name == "job.started"
        assert next(events).id == "1"
        waiting.start()
        wait_until(lambda: api.services.streams.num_streams == 2)
        api.stop(grace_seconds=60)
        assert list(events) == []
        waiting.join()
        assert answers[0].json()["status"] == "in_progress"
        hand_worker.say(job, "b", first=2)
        hand_worker.finish(job, "a", "b")
        with other.client() as elsewhere:
            resumed = all_events(elsewhere, job_id, params={"starting_after": 1})
        assert [event.id for event in resumed if event.id] == ["2", "3"]


def test_an_answer_under_way_is_given_before_the_end(api: ApiServer) -> None:
    head = b"POST /v1/jobs HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 32\r\n\r\n"
    with closing(socket.create_connection(("127.0.0.1", api.port))) as connection:
        connection.sendall(head)
        wait_until(lambda: http_in_progress() >= 1)
        stopping = threading.Thread(target=partial(api.stop, grace_seconds=60))
        stopping.start()
        wait_until(lambda: api.services.draining.is_set())
        connection.sendall(b'{"model":"fake","prompt":"abcd"}')
        assert connection.recv(65_536).startswith(b"HTTP/1.1 202")
        stopping.join()


def http_in_progress() -> float:
    return registries[Process.API].get_sample_value("celeriac_http_requests_in_progress") or 0.0
