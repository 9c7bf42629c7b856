"""A call that ends without an answer after a long wait: every client sees that, and a retry is told the reason."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import openai
import pytest

from domain.jobs import JobError, JobStatus, external_id
from settings import Settings
from storage import job_queries, jobs
from storage.tables import DEFAULT_TENANT_ID
from tests.conformance.harness import MESSAGES
from tests.integration.api_harness import ApiServer, HandWorker
from tests.waiting import wait_until

SEVERAL_SIGNS_SECONDS = 0.5
NO_WORKERS_SECONDS = 2.0
TIMEOUT = {"x-stainless-read-timeout": "600"}
RETRY = {"x-stainless-retry-count": "1", **TIMEOUT}
BODY = {"model": "fake", "messages": MESSAGES, "max_tokens": 9}
ROUTES = {
    "/v1/chat/completions": BODY,
    "/v1/completions": {"model": "fake", "prompt": "Hi", "max_tokens": 9},
    "/v1/responses": {"model": "fake", "input": "Hi", "max_output_tokens": 16},
    "/generate": {"model": "fake", "prompt": "Hi"},
}


@pytest.fixture
def api_settings(database_url: str, redis_url: str) -> Settings:
    return Settings(
        database_url=database_url, redis_url=redis_url, stream_heartbeat_seconds=0.1, no_workers_seconds=1_000
    )


def fail_next(worker: HandWorker) -> None:
    """The one job that waits, after long enough for a sign of life."""

    def waiting() -> list[Any]:
        with worker.sessions() as session:
            listed = job_queries.list_jobs(session, DEFAULT_TENANT_ID)
        return [job for job in listed if job.status is JobStatus.QUEUED]

    [job] = wait_until(waiting)
    claimed = worker.claim(external_id(job.id))
    time.sleep(SEVERAL_SIGNS_SECONDS)
    worker.finish(claimed, status=JobStatus.FAILED, error=JobError(code="engine_error", message="it broke"))


def while_it_fails(worker: HandWorker, ask: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as threads:
        failing = threads.submit(fail_next, worker)
        try:
            return ask()
        finally:
            failing.result()


@pytest.mark.parametrize("route", ROUTES)
def test_a_client_without_a_timeout_of_its_own_is_cut_off(
    http: httpx.Client, hand_worker: HandWorker, route: str
) -> None:
    def ask() -> None:
        with pytest.raises(httpx.RemoteProtocolError, match="incomplete"):
            http.post(route, json=ROUTES[route])

    while_it_fails(hand_worker, ask)


@pytest.mark.parametrize("route", ROUTES)
def test_a_client_that_says_how_long_it_waits_gets_the_status(
    http: httpx.Client, hand_worker: HandWorker, route: str
) -> None:
    answer = while_it_fails(hand_worker, lambda: http.post(route, json=ROUTES[route], headers=TIMEOUT))
    assert answer.status_code == 500
    assert answer.content.startswith(b"{"), "not kept alive with line breaks"
    assert answer.json()["error"]["code"] == "engine_error"


def test_the_retry_of_a_call_that_was_cut_off_is_told_the_reason(http: httpx.Client, hand_worker: HandWorker) -> None:
    def ask() -> None:
        with pytest.raises(httpx.RemoteProtocolError):
            http.post("/v1/chat/completions", json=BODY)

    while_it_fails(hand_worker, ask)
    again = http.post("/v1/chat/completions", json=BODY, headers=RETRY)
    assert again.headers["x-retry-attached"] == "true"
    assert (again.status_code, again.json()["error"]["code"]) == (500, "engine_error")
    assert again.headers["x-should-retry"] == "false"


def test_the_sdk_raises_the_error_of_a_job_that_failed_late(client: openai.OpenAI, hand_worker: HandWorker) -> None:
    def ask() -> None:
        with pytest.raises(openai.InternalServerError, match="it broke"):
            client.chat.completions.create(model="fake", messages=MESSAGES, max_tokens=9)

    while_it_fails(hand_worker, ask)


def test_a_kept_alive_answer_that_comes_is_whole(http: httpx.Client, hand_worker: HandWorker) -> None:
    def succeed() -> None:
        def waiting() -> list[Any]:
            with hand_worker.sessions() as session:
                return list(job_queries.list_jobs(session, DEFAULT_TENANT_ID))

        job = hand_worker.claim(external_id(wait_until(waiting)[0].id))
        time.sleep(SEVERAL_SIGNS_SECONDS)
        hand_worker.say(job, "done")
        hand_worker.finish(job, "done")

    with ThreadPoolExecutor(1) as threads:
        succeeding = threads.submit(succeed)
        answer = http.post("/v1/chat/completions", json=BODY)
        succeeding.result()
    assert answer.content.startswith(b"\n")
    assert answer.json()["choices"][0]["message"]["content"] == "done"


def refused_of(model: str, http: httpx.Client) -> float:
    """How many requests for the model were refused as nobody serves it."""
    lines = http.get("/metrics").text.splitlines()
    [count] = [
        line.split()[-1] for line in lines if line.startswith(f'celeriac_requests_unserved_total{{model="{model}"')
    ]
    return float(count)


class TestTheLastWorkerWentAway:
    """After the accept: at the door a call is refused already."""

    @pytest.fixture
    def api(self, api_settings: Settings) -> Iterator[ApiServer]:
        with ApiServer(api_settings.model_copy(update={"no_workers_seconds": NO_WORKERS_SECONDS})) as server:
            yield server

    @pytest.fixture(autouse=True)
    def seen_just_now(self, api: ApiServer) -> None:
        """As if a worker had gone this moment."""
        api.services.monitor._served_at["fake"] = time.monotonic()

    @pytest.mark.parametrize("route", ROUTES)
    def test_a_call_that_waits_is_refused(self, http: httpx.Client, route: str) -> None:
        answer = http.post(route, json=ROUTES[route], headers=TIMEOUT)
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "no_workers"
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.headers["x-job-id"]

    @pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
    def test_a_stream_that_waits_says_so_and_ends(self, http: httpx.Client, route: str) -> None:
        answer = http.post(route, json=ROUTES[route] | {"stream": True})
        assert answer.status_code == 200
        assert '"code":"no_workers"' in answer.text.strip().split("\n")[-1]

    @pytest.mark.parametrize("route", ROUTES)
    def test_a_call_that_says_how_long_it_waits_is_answered_when_a_worker_comes(
        self, http: httpx.Client, hand_worker: HandWorker, api: ApiServer, route: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("api.openai.running.UNSERVED_POLL_SECONDS", 0.05)
        api.services.monitor._served_at["fake"] = time.monotonic() - 3600
        wait_until(lambda: api.services.monitor.unserved_seconds("fake") > NO_WORKERS_SECONDS)  # the queues were read
        before = refused_of("fake", http)
        body = ROUTES[route] | ({"store": False} if route == "/v1/responses" else {})
        assert http.post(route, json=body).status_code == 503
        assert refused_of("fake", http) == before + 1, "by which a scaler learns that somebody wants a worker"

        def work() -> None:
            job = hand_worker.claim(external_id(wait_until(waiting)[0].id))
            hand_worker.say(job, "late")
            hand_worker.finish(job, "late")

        def waiting() -> list[Any]:
            with hand_worker.sessions() as session:
                return list(job_queries.list_jobs(session, DEFAULT_TENANT_ID))

        with ThreadPoolExecutor(1) as threads:
            streamed = {"stream": True} if route == "/v1/chat/completions" else {}
            asking = threads.submit(
                http.post, route, json=body | streamed, headers=TIMEOUT | {"x-start-timeout": "10m"}
            )
            wait_until(waiting)
            time.sleep(SEVERAL_SIGNS_SECONDS)  # looks for a worker ten times meanwhile
            work()
            answer = asking.result()
        assert answer.status_code == 200, answer.text
        assert "late" in answer.text
        assert answer.headers["x-queue-waiting-for"] == "worker"

    def test_patience_ends_with_the_start_timeout_even_for_a_job_that_has_started(
        self, http: httpx.Client, hand_worker: HandWorker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Once it has started, nothing but the call itself ends what waits for a worker again."""
        monkeypatch.setattr("api.openai.running.UNSERVED_POLL_SECONDS", 0.05)
        monkeypatch.setattr("api.openai.running.PATIENCE_SECONDS", 0.0)

        def lose() -> None:
            def waiting() -> list[Any]:
                with hand_worker.sessions() as session:
                    return list(job_queries.list_jobs(session, DEFAULT_TENANT_ID))

            job = hand_worker.claim(external_id(wait_until(waiting)[0].id))
            hand_worker.say(job, "begun")
            with hand_worker.sessions.begin() as session:
                later = datetime.now(UTC) + timedelta(hours=1)
                [lost] = jobs.rescue(session, as_of=later, grace_seconds=0, quiet_seconds=0)
            assert (lost.job_id, lost.status) == (job.id, JobStatus.QUEUED)

        with ThreadPoolExecutor(1) as threads:
            losing = threads.submit(lose)
            answer = http.post("/v1/chat/completions", json=BODY, headers=TIMEOUT | {"x-start-timeout": "4s"})
            losing.result()
        assert answer.status_code == 503, answer.text
        assert answer.json()["error"]["code"] == "no_workers"

    def test_a_call_counts_once_however_many_jobs_it_has(self, http: httpx.Client) -> None:
        before = refused_of("fake", http)
        body = {"model": "fake", "prompt": ["Hi", "Ho"], "max_tokens": 9}
        assert http.post("/v1/completions", json=body, headers=TIMEOUT).status_code == 503
        assert refused_of("fake", http) == before + 1

    def test_a_call_for_an_unloaded_model_calls_for_no_worker(self, http: httpx.Client) -> None:
        before = refused_of("fake", http)
        assert http.post("/v1/admin/models/fake/unload").status_code == 202
        assert http.post("/v1/completions", json=ROUTES["/v1/completions"]).status_code == 503
        assert refused_of("fake", http) == before

    def test_a_job_that_runs_is_left_to_its_worker(self, http: httpx.Client, hand_worker: HandWorker) -> None:
        def run() -> None:
            def waiting() -> list[Any]:
                with hand_worker.sessions() as session:
                    return list(job_queries.list_jobs(session, DEFAULT_TENANT_ID))

            job = hand_worker.claim(external_id(wait_until(waiting)[0].id))
            time.sleep(2 * NO_WORKERS_SECONDS)
            hand_worker.say(job, "late")
            hand_worker.finish(job, "late")

        with ThreadPoolExecutor(1) as threads:
            running = threads.submit(run)
            answer = http.post("/v1/chat/completions", json=BODY, headers=TIMEOUT)
            running.result()
        assert answer.status_code == 200, answer.text
