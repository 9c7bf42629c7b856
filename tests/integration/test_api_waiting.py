"""Every queued job says why it waits, wherever it is shown; and what waits in vain is told."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from functools import partial
from uuid import UUID, uuid4

import httpx
import pytest
from sqlalchemy import select, update
from sqlalchemy.orm import Session, sessionmaker

from domain.jobs import BATCH_PRIORITY, Lane, WorkerState
from storage import batch_lines, workers
from storage.tables import Job, JobChunk
from storage.workers import WorkerReport
from tests.conftest import MakeJob
from tests.integration.api_harness import MODEL, ApiServer, HandWorker, make_chunk, open_events, post_job
from tests.waiting import wait_until

Sessions = sessionmaker[Session]


def serve(sessions: Sessions, state: str = "ready", revision: str = "fake:main") -> UUID:
    worker = uuid4()
    report = WorkerReport(worker, "gpu@here", MODEL, 4, 0, 20.0, revision, WorkerState(state))
    with sessions.begin() as session:
        workers.heartbeat(session, report)
    return worker


def queue_of(http: httpx.Client) -> dict[str, object]:
    return next(dict(queue) for queue in http.get("/v1/queue").json()["data"] if queue["model"] == MODEL)


def unload(sessions: Sessions) -> None:
    serve(sessions)
    with sessions.begin() as session:
        workers.set_model_loaded(session, MODEL, is_loaded=False)


def serve_another(sessions: Sessions) -> None:
    """The job's three chunks are of a revision that this worker does not have."""
    serve(sessions)
    with sessions.begin() as session:
        job_id = session.scalars(select(Job.id)).one()
        for number in range(1, 4):
            chunk = make_chunk(number, "a")
            session.add(JobChunk(job_id=job_id, sequence_number=number, attempt=1, chunk=chunk))


BEGUN = {"committed_sequence_number": 3, "num_committed_tokens": 3, "model_revision": "fake:old"}
REASONS: dict[str, tuple[Callable[[Sessions], object], dict[str, object]]] = {
    "slots": (serve, {}),
    "turn": (serve, {"paused_at": datetime.now(UTC)}),
    "worker": (lambda sessions: None, {}),
    "model_load": (lambda sessions: serve(sessions, "loading"), {}),
    "revision": (serve_another, BEGUN),
    "isolation": (serve, {"lane": Lane.ISOLATED}),
    "pause": (unload, {}),
}


@pytest.mark.parametrize("reason", REASONS)
def test_a_queued_job_says_why_it_waits_wherever_it_is_shown(
    http: httpx.Client, session_factory: Sessions, reason: str
) -> None:
    prepare, columns = REASONS[reason]
    name = post_job(http)["id"]
    with session_factory.begin() as session:
        session.execute(update(Job).values(columns or {"num_dispatches": 0}))
    prepare(session_factory)
    assert wait_until(lambda: queue_of(http)["waiting_for"] == {reason: 1}), queue_of(http)
    queue = http.get(f"/v1/jobs/{name}").json()["queue"]
    assert (queue["position"], queue["waiting_for"]) == (0, reason)
    assert queue["eta_seconds"] == (0.0 if reason in ("slots", "turn") else None)
    assert [job["queue"]["waiting_for"] for job in http.get("/v1/jobs").json()["data"]] == [reason]
    with open_events(http, name) as events:
        told = next(event for event in events if event.name == "job.queued")
    assert told.data["waiting_for"] == reason
    metrics = http.get("/metrics").text
    assert f'celeriac_jobs_queued{{model="{MODEL}",reason="{reason}"}} 1.0' in metrics


def test_a_job_that_is_accepted_says_it_at_once(http: httpx.Client, session_factory: Sessions) -> None:
    serve(session_factory, "draining")
    wait_until(lambda: post_job(http)["queue"]["waiting_for"] == "pause")


def test_a_job_says_which_clocks_it_was_given(http: httpx.Client, hand_worker: HandWorker) -> None:
    deadline = (datetime.now(UTC) + timedelta(hours=1)).replace(microsecond=0)
    asked = {"deadline": deadline.isoformat(), "start_timeout": 90.5, "run_timeout": 30}
    accepted = post_job(http, **asked)
    hand_worker.claim(accepted["id"])  # which narrows its deadline to the end of its run timeout
    for job in (accepted, http.get(f"/v1/jobs/{accepted['id']}").json(), http.get("/v1/jobs").json()["data"][0]):
        assert datetime.fromisoformat(job["deadline"]) == deadline
        assert (job["start_timeout"], job["run_timeout"]) == (90.5, 30)
    bare = post_job(http)
    assert [bare[name] for name in asked] == [None] * 3


MESSAGES: dict[str, object] = {"messages": [{"role": "user", "content": "a"}]}
BODY_BY_PATH: dict[str, dict[str, object]] = {
    "/v1/chat/completions": MESSAGES,
    "/v1/completions": {"prompt": "a"},
    "/v1/responses": {"input": "a"},
    "/v1/messages": MESSAGES | {"max_tokens": 8},
    "/generate": {"prompt": "a"},
    "/generate_stream": {"prompt": "a"},
    "/chat": {"prompt": "a", "model": "large"},
    "/api/v1/infer": {"prompt": "a", "model": "large"},
}


def test_every_route_takes_timeouts_in_its_body_before_those_of_the_headers(http: httpx.Client) -> None:
    headers = {"x-start-timeout": "1m", "x-run-timeout": "2m"}
    with ThreadPoolExecutor(len(BODY_BY_PATH)) as clients:
        for path, fields in BODY_BY_PATH.items():
            body = {"model": MODEL, "start_timeout": 5.5} | fields
            call = clients.submit(http.post, path, json=body, headers=headers, timeout=None)
            [job] = wait_until(partial(queued_jobs, http), f"{path} has made a job")
            http.post(f"/v1/jobs/{job['id']}/cancel")  # so that the call is answered
            assert (job["start_timeout"], job["run_timeout"]) == (5.5, 120), path
            call.result()


def queued_jobs(http: httpx.Client) -> list[dict[str, object]]:
    return list(http.get("/v1/jobs", params={"status": "queued"}).json()["data"])


def test_lines_of_batches_wait_for_their_share_though_slots_are_free(
    http: httpx.Client, session_factory: Sessions, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_job(model=MODEL, priority=BATCH_PRIORITY)
    serve(session_factory)
    wait_until(lambda: queue_of(http)["waiting_for"] == {"slots": 1})
    monkeypatch.setattr(batch_lines, "num_outstanding", lambda session, model: 3)  # of four slots
    wait_until(lambda: queue_of(http)["waiting_for"] == {"limit": 1})


@pytest.mark.parametrize("reason", [reason for reason in REASONS if reason not in ("slots", "turn")])
def test_what_waits_in_vain_for_a_minute_is_a_finding_and_no_good_health(
    http: httpx.Client, api: ApiServer, session_factory: Sessions, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare, columns = REASONS[reason]
    post_job(http)
    old = {"created_at": Job.created_at - timedelta(seconds=90)}
    with session_factory.begin() as session:
        session.execute(update(Job).values(old | columns))
    prepare(session_factory)
    wait_until(lambda: queue_of(http)["waiting_for"] == {reason: 1})
    health = http.get("/health").json()
    assert health["findings"] == []  # the job is old enough, the reason is not
    assert health["status"] == ("ok" if reason in ("revision", "isolation", "pause") else "degraded")
    since = api.services.monitor._waiting_since
    wait_until(lambda: since.update({key: since[key] - 70 for key in since}) or http.get("/health").json()["findings"])
    health = http.get("/health").json()
    [finding] = health["findings"]
    assert (finding["model"], finding["waiting_for"], finding["jobs"]) == (MODEL, reason, 1)
    assert finding["seconds"] > 60
    assert finding["message"]
    assert health["status"] == "degraded"


def test_a_turn_that_takes_long_is_no_finding(http: httpx.Client, api: ApiServer, session_factory: Sessions) -> None:
    post_job(http)
    with session_factory.begin() as session:
        session.execute(update(Job).values(created_at=Job.created_at - timedelta(hours=1)))
    serve(session_factory)
    wait_until(lambda: queue_of(http)["waiting_for"] == {"slots": 1})
    since = api.services.monitor._waiting_since
    since.update({key: since[key] - 3600 for key in since})
    assert api.services.monitor.findings == []
