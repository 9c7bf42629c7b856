"""The response cache: a request that was answered before is a job that is born completed, with the same output."""

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any

import httpx
import pytest
from sqlalchemy import func, select, text
from sqlalchemy.orm import Session, sessionmaker

from api.queue_monitor import QueueMonitor
from api.services import Services
from domain.access import Limits
from domain.errors import InvalidRequest
from domain.jobs import JobError, JobStatus, external_id, new_id, parse_id
from metrics import Process, registries
from settings import Settings
from storage import administration, answers, job_queues, jobs, tenants, workers
from storage.administration import TenantChanges
from storage.job_accept import NewJob
from storage.limits import OF_TENANT, LimitUse
from storage.streams import StreamReader
from storage.tables import ApiKey, Job, Tenant, TenantLoad
from storage.usage import UsageRecord
from storage.workers import WorkerReport
from tests.integration.api_harness import ApiServer, HandWorker, all_events, numbered

GREEDY = {"temperature": 0, "max_tokens": 8}
JOB = {"model": "large", "prompt": "abc", "params": GREEDY}
Sessions = sessionmaker[Session]


@pytest.fixture
def api_settings(database_url: str, redis_url: str) -> Settings:
    return Settings(
        database_url=database_url,
        redis_url=redis_url,
        auth="api_key",
        response_cache="greedy",
        webhook_private_targets=True,
    )


@pytest.fixture
def clients(
    api: ApiServer, session_factory: Sessions, make_tenant: Callable[..., Tenant]
) -> Iterator[tuple[httpx.Client, httpx.Client]]:
    with session_factory.begin() as session:
        keys = [tenants.create_key(session, make_tenant().id) for _ in range(2)]
    with api.client(keys[0]) as one, api.client(keys[1]) as other:
        yield one, other


@pytest.fixture
def client(clients: tuple[httpx.Client, httpx.Client]) -> httpx.Client:
    return clients[0]


def ask(client: httpx.Client, prompt: str = "abc", **fields: Any) -> httpx.Response:
    job = JOB | {"prompt": prompt} | fields
    answer = client.post("/v1/jobs", json=job)
    assert answer.status_code in (200, 202), answer.text
    return answer


def run(worker: HandWorker, job_id: str, *texts: str) -> None:
    job = worker.claim(job_id)
    worker.say(job, *texts)
    worker.finish(job, *texts)


def outcome_of(answer: httpx.Response) -> tuple[int, str | None, bool]:
    return answer.status_code, answer.headers.get("x-celeriac-cache"), answer.json()["cached"]


def test_a_hit_is_a_job_born_completed(
    client: httpx.Client, hand_worker: HandWorker, session_factory: Sessions
) -> None:
    first = ask(client)
    assert outcome_of(first) == (202, "miss", False)
    run(hand_worker, first.json()["id"], "Hello", " world")
    second = ask(client, metadata={"a": "b"}, webhook="https://localhost:8443/")
    assert outcome_of(second) == (200, "hit", True)
    whole, job = client.get(first.headers["location"]).json(), second.json()
    assert job["id"] != whole["id"]
    for name in ("status", "output", "usage", "finish_reason", "error"):
        assert job[name] == whole[name], name
    assert (job["metadata"], job["attempt"], job["cancel_requested"]) == ({"a": "b"}, 0, False)
    events, its_events = (all_events(client, one["id"]) for one in (whole, job))
    assert [(e.name, e.id) for e in events if e.id] == [(e.name, e.id) for e in its_events if e.id]
    assert [e.data["text"] for e in its_events if e.name == "output.delta"] == ["Hello", " world"]
    resumed = all_events(client, job["id"], headers={"last-event-id": "1"})
    assert numbered(resumed) == numbered(its_events)[1:]
    assert client.get(f"/v1/jobs/{job['id']}/output").text == "Hello world"
    assert client.get(f"/v1/jobs/{job['id']}?include=attempts").json()["attempts"] == []
    with session_factory() as session:
        assert session.scalar(text("SELECT count(*) FROM webhook_deliveries")) == 1
        loads = session.execute(select(func.sum(TenantLoad.num_queued), func.sum(TenantLoad.num_running))).one()
        assert tuple(loads) == (0, 0)
        _, hit = session.scalars(select(UsageRecord).order_by(UsageRecord.ended_at))
        assert (external_id(hit.job_id), hit.outcome, hit.is_end, hit.is_attempt) == (
            job["id"],
            "completed",
            True,
            False,
        )
        assert (hit.num_prompt_tokens, hit.num_output_tokens, hit.attempt, hit.engine_seconds) == (0, 0, 0, 0)


def test_neither_a_hit_nor_a_follower_takes_tokens_of_a_limit(
    client: httpx.Client, hand_worker: HandWorker, session_factory: Sessions
) -> None:
    key_id = client.headers["authorization"].split("_")[1]
    with session_factory.begin() as session:
        name = session.scalars(select(Tenant.name).join(ApiKey).where(ApiKey.id == key_id)).one()
        changes = TenantChanges(limits=Limits(tokens_per_minute=1_000_000))
        administration.change_tenant(session, name, changes, actor="test")
    leader, _ = ask(client).json()["id"], ask(client)
    run(hand_worker, leader, "Hello")
    with session_factory.begin() as session:
        assert len(answers.end_followers(session)) == 1
    ask(client)
    with session_factory() as session:
        unused = session.scalars(select(LimitUse.num_unused_tokens).where(LimitUse.key_id == OF_TENANT)).one()
        costs = session.scalars(select(Job.cost).where(Job.answered_by.is_not(None))).all()
        leader_left = session.scalars(
            select(Job.cost - Job.num_prompt_tokens - Job.num_committed_tokens).where(Job.answered_by.is_(None))
        ).one()
    assert len(costs) == 2
    assert unused == sum(costs) + leader_left


def test_many_hits_at_once_have_the_answers_to_their_own_questions(
    client: httpx.Client, hand_worker: HandWorker
) -> None:
    prompts = ["abc", "bcd", "cde"]
    for prompt in prompts:
        run(hand_worker, ask(client, prompt).json()["id"], f"answer to {prompt}")
    with ThreadPoolExecutor(12) as pool:
        asked = [prompt for prompt in prompts for _ in range(8)]
        found = list(pool.map(lambda prompt: ask(client, prompt).json(), asked))
    assert [job["output"]["text"] for job in found] == [f"answer to {prompt}" for prompt in asked]


def test_a_question_whose_answer_is_known_is_not_tokenized_again(
    client: httpx.Client, hand_worker: HandWorker, clients: tuple[httpx.Client, httpx.Client]
) -> None:
    run(hand_worker, ask(client).json()["id"], "Hello")
    assert outcome_of(ask(client)) == (200, "hit", True)
    before = num_tokenized()
    assert outcome_of(ask(client)) == (200, "hit", True)
    assert num_tokenized() == before
    ask(client, "another question")
    ask(clients[1])  # another tenant's, which nobody has answered
    assert num_tokenized() == before + 2


def num_tokenized() -> float:
    """How many prompts this process, in which the API runs, has tokenized."""
    return registries[Process.API].get_sample_value("celeriac_tokenize_seconds_count", {"model": "large"}) or 0.0


@pytest.mark.parametrize(
    "path",
    [
        "/v1/jobs",
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/messages",
        "/generate",
        "/api/v1/infer",
    ],
)
def test_a_body_whose_answer_is_known_is_not_read_again(
    clients: tuple[httpx.Client, httpx.Client],
    hand_worker: HandWorker,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
) -> None:
    client, other = clients
    body = BODIES.get(path) or {"model": "large", "prompt": "abc", "params": GREEDY}
    body = body | ({"presence_penalty": 0, "modalities": ["text"]} if path == "/v1/chat/completions" else {})
    headers = {"x-on-disconnect": "continue"}
    with suppress(httpx.ReadTimeout):
        client.post(path, json=body, headers=headers, timeout=2)
    run(hand_worker, client.get("/v1/jobs").json()["data"][0]["id"], "Hello")
    hits = [client.post(path, json=body) for _ in range(2)]

    def parse(*args: object, **fields: object) -> None:
        raise InvalidRequest("read")

    monkeypatch.setattr("api.openai.responses.parse_model" if "responses" in path else "api.inputs.parse_model", parse)
    hits.append(client.post(path, json=body))
    assert [hit.headers["x-celeriac-cache"] for hit in hits] == ["hit"] * 3
    assert len({hit.headers["x-job-id"] for hit in hits}) == 3
    assert len({hit.headers.get("x-ignored-fields") for hit in hits}) == 1
    assert all("Hello" in hit.text for hit in hits)
    for somebody, asked in ((other, body), (client, body | {"model": "tiny"})):
        assert somebody.post(path, json=asked).status_code == 400


def test_a_body_whose_answer_is_known_is_neither_hashed_again_nor_written_as_it_was_for_another_key(
    client: httpx.Client,
    hand_worker: HandWorker,
    session_factory: Sessions,
    api: ApiServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run(hand_worker, ask(client).json()["id"], "Hello")
    for _ in range(2):  # it is written down once it has come again
        assert outcome_of(ask(client)) == (200, "hit", True)

    def hashed(*args: object) -> None:
        raise InvalidRequest("hashed")

    monkeypatch.setattr("tasks.submit.request_hash", hashed)
    job = {"model": "large", "prompt": "abc", "params": GREEDY}
    plain, named = (client.post("/v1/jobs", json=job, headers=given) for given in ({}, {"idempotency-key": "mine"}))
    with session_factory.begin() as session:
        tenant_id = session.scalars(select(Job.tenant_id)).first()
        assert tenant_id is not None
        other_key = tenants.create_key(session, tenant_id)
    with api.client(other_key) as other:
        by_other_key = other.post("/v1/jobs", json=job)
    for hit in (plain, named, by_other_key):
        assert outcome_of(hit) == (200, "hit", True)
    with session_factory() as session:
        rows = session.execute(select(Job.key_id, Job.idempotency_key, Job.request_hash).order_by(Job.id)).all()
    key_id, other_id = (key.split("_")[1] for key in (client.headers["authorization"], other_key))
    assert [row.key_id for row in rows] == [key_id] * 5 + [other_id]
    assert [row.idempotency_key for row in rows] == [None, None, None, None, "mine", None]
    assert len({row.request_hash for row in rows}) == 1


def test_a_hit_is_delivered_from_its_birth_so_that_its_retry_is_another_hit(
    client: httpx.Client, hand_worker: HandWorker, session_factory: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(hand_worker, ask(client).json()["id"], "Hello")
    body = {"model": "large", "prompt": "abc"} | GREEDY
    noted: list[object] = []
    monkeypatch.setattr(Services, "note_delivered", lambda services, job_id: noted.append(job_id))
    first = client.post("/v1/completions", json=body)
    retried = client.post("/v1/completions", json=body, headers={"x-stainless-retry-count": "1"})
    assert [hit.headers["x-celeriac-cache"] for hit in (first, retried)] == ["hit", "hit"]
    assert first.headers["x-job-id"] != retried.headers["x-job-id"]
    assert not noted
    with session_factory() as session:
        job = session.get_one(Job, parse_id(first.headers["x-job-id"]))
        assert job.delivered_at == job.finished_at


def test_a_hit_joins_no_queue(
    client: httpx.Client, hand_worker: HandWorker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run(hand_worker, ask(client).json()["id"], "Hello")
    joined: list[NewJob] = []
    monkeypatch.setattr(QueueMonitor, "accepted", lambda monitor, new_job: joined.append(new_job))
    with caplog.at_level(logging.INFO, "celeriac.jobs"):
        hit = ask(client)
    assert outcome_of(hit)[1] == "hit"
    lines = [line for line in caplog.records if vars(line).get("job_id") == hit.json()["id"]]
    assert [(line.getMessage(), vars(line)["cached"]) for line in lines] == [("job accepted and answered", True)]
    request = {"model": "large", "prompt": "abc", "temperature": 0, "max_tokens": 8}
    assert client.post("/v1/completions", json=request).headers["x-celeriac-cache"] == "hit"
    assert not joined
    ask(client, "another")
    assert len(joined) == 1


def test_a_request_to_infer_that_says_use_cache_is_answered_from_the_cache(
    client: httpx.Client, hand_worker: HandWorker
) -> None:
    def infer(**fields: object) -> httpx.Response:
        return client.post("/api/v1/infer", json={"model": "large", "prompt": "abc", "max_tokens": 8} | fields)

    run(hand_worker, ask(client, params={"max_tokens": 8}, use_cache=True).json()["id"], "Hello")
    hit = infer(use_cache=True)
    assert (hit.headers.get("x-celeriac-cache"), hit.json()["cached"]) == ("hit", True)
    assert hit.json()["text"] == "Hello"


def test_what_is_not_the_same_runs(
    clients: tuple[httpx.Client, httpx.Client], hand_worker: HandWorker, session_factory: Sessions
) -> None:
    client, other = clients
    first = ask(client).json()["id"]
    run(hand_worker, first, "Hello")
    assert outcome_of(ask(other)) == (202, "miss", False), "of another tenant"
    assert outcome_of(ask(client, prompt="abcd")) == (202, "miss", False)
    assert outcome_of(ask(client, params=GREEDY | {"max_tokens": 9})) == (202, "miss", False)
    assert outcome_of(ask(client, params=GREEDY | {"stop": ["x"]})) == (202, "miss", False)
    assert outcome_of(ask(client, use_cache=False)) == (202, None, False)
    assert outcome_of(ask(client, params={"max_tokens": 8})) == (202, None, False), "its output is random"
    assert outcome_of(ask(client, params=GREEDY | {"seed": 7})) == (200, "hit", True), "no seed matters to greedy"
    assert client.post(f"/v1/jobs/{first}/cancel").json()["status"] == "completed"
    with session_factory.begin() as session:
        session.execute(text("UPDATE answers SET created_at = created_at - interval '2 days'"))
    assert outcome_of(ask(client)) == (202, "miss", False), "it is too old"


def test_an_answer_that_is_gone_is_a_miss(client: httpx.Client, hand_worker: HandWorker) -> None:
    first = ask(client).json()["id"]
    run(hand_worker, first, "Hello")
    assert client.delete(f"/v1/jobs/{first}").status_code == 200
    second = ask(client)
    assert outcome_of(second) == (202, "miss", False)
    run(hand_worker, second.json()["id"], "Hello again")
    assert ask(client).json()["output"]["text"] == "Hello again"


def test_an_answer_of_files_that_were_replaced_is_a_miss(
    client: httpx.Client, hand_worker: HandWorker, session_factory: Sessions
) -> None:
    """Also before the API was restarted, which is not told."""
    report = WorkerReport(
        id=new_id(),
        hostname="w",
        model="large",
        max_num_seqs=4,
        num_running=0,
        tokens_per_second=1.0,
        model_revision="fake:main",
    )
    with session_factory.begin() as session:
        workers.heartbeat(session, report)
    for prompt in ("abc", "abcd"):
        run(hand_worker, ask(client, prompt).json()["id"], "Hello")
        assert outcome_of(ask(client, prompt)) == (200, "hit", True)
    with session_factory.begin() as session:
        workers.heartbeat(session, replace(report, model_revision="fake:retrained"))
    assert outcome_of(ask(client)) == (202, "miss", False)
    keyed = client.post("/v1/jobs", json=JOB | {"prompt": "abcd"}, headers={"idempotency-key": "k"})
    assert outcome_of(keyed) == (202, "miss", False)


NO_CHOICE = '{"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 0}}'

VECTORS = '{"kind": "embedding", "embeddings": [], "dimensions": 1, "usage": {"prompt_tokens": 1}}'


@pytest.mark.parametrize("result", ['{"oops": 1}', "[]", "null", "7", '"a"', NO_CHOICE, VECTORS])
def test_an_answer_that_cannot_be_read_is_a_miss(
    client: httpx.Client, hand_worker: HandWorker, session_factory: Sessions, result: str
) -> None:
    first = ask(client).json()["id"]
    run(hand_worker, first, "Hello")
    with session_factory.begin() as session:
        statement = text("UPDATE job_results SET result = CAST(:result AS json) WHERE job_id = :job_id")
        session.execute(statement, {"result": result, "job_id": parse_id(first)})
    keyed = client.post("/v1/jobs", json=JOB, headers={"idempotency-key": "k"})
    assert keyed.status_code == 202, keyed.text
    assert client.post(f"/v1/jobs/{keyed.json()['id']}/cancel").status_code == 200
    second = ask(client)
    assert outcome_of(second) == (202, "miss", False)
    run(hand_worker, second.json()["id"], "Hello again")
    assert ask(client).json()["output"]["text"] == "Hello again", "whoever asks next has a new answer"


@pytest.mark.parametrize("headers", [{}, {"idempotency-key": "k"}])
def test_an_answer_whose_chunks_are_gone_is_a_miss(
    client: httpx.Client, hand_worker: HandWorker, session_factory: Sessions, headers: dict[str, str]
) -> None:
    first = ask(client).json()["id"]
    follower = ask(client).json()["id"]
    run(hand_worker, first, "Hel", "lo")
    with session_factory.begin() as session:
        session.execute(text("DELETE FROM job_chunks WHERE sequence_number = 1"))
        assert answers.end_followers(session) == []
        assert session.get_one(Job, parse_id(follower)).available_at <= session.scalars(select(func.now())).one()
    answer = client.post("/v1/jobs", json=JOB, headers=headers)
    assert outcome_of(answer) == (202, "miss", False)


def test_an_answer_that_cannot_be_read_takes_nobody_elses(
    api: ApiServer,
    clients: tuple[httpx.Client, httpx.Client],
    hand_worker: HandWorker,
    session_factory: Sessions,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In one group, of another tenant."""
    poisoned = clients[0]
    firsts = [ask(client).json()["id"] for client in clients]
    for first in firsts:
        run(hand_worker, first, "Hello")
    with session_factory.begin() as session:
        statement = text("UPDATE job_results SET result = 'null' WHERE job_id = :job_id")
        session.execute(statement, {"job_id": parse_id(firsts[0])})
    acceptor = api.services.submitter._acceptor
    take_group, keyed = acceptor._take_group, {"idempotency-key": "k"}
    monkeypatch.setattr(acceptor, "_take_group", lambda: take_group() if len(acceptor._waiting) >= 2 else [])
    with ThreadPoolExecutor(2) as threads:
        asking = [threads.submit(client.post, "/v1/jobs", json=JOB, headers=keyed) for client in clients]
        answers_of_both = [one.result() for one in asking]
    monkeypatch.undo()
    assert [outcome_of(one)[1:] for one in answers_of_both] == [("miss", False), ("hit", True)]
    run(hand_worker, answers_of_both[0].json()["id"], "Hello again")
    assert outcome_of(poisoned.post("/v1/jobs", json=JOB, headers={"idempotency-key": "l"})) == (200, "hit", True)


def test_any_answer_will_do_if_the_client_says_so(client: httpx.Client, hand_worker: HandWorker) -> None:
    params = {"max_tokens": 8, "temperature": 1}
    first = ask(client, params=params, use_cache=True)
    assert outcome_of(first) == (202, "miss", False)
    run(hand_worker, first.json()["id"], "Hello")
    assert outcome_of(ask(client, params=params, use_cache=True)) == (200, "hit", True)
    assert outcome_of(ask(client, params=params | {"seed": 1}, use_cache=True)) == (202, "miss", False)


def test_the_same_request_in_flight_is_run_once(
    client: httpx.Client, hand_worker: HandWorker, session_factory: Sessions
) -> None:
    leader, *followers = (ask(client).json()["id"] for _ in range(3))
    assert waiting(session_factory) == 1
    with session_factory() as session:
        figures = job_queues.queue_figures(session)["large"]
        [load] = figures.loads.values()
        assert load.num_jobs == 1, "followers are no work"
        assert {group.job.is_following: group.num_jobs for group in figures.waiting} == {False: 1, True: 2}
        places = job_queues.positions(session, [parse_id(one) for one in (leader, *followers)])
        assert [places[parse_id(one)].job.is_following for one in (leader, *followers)] == [False, True, True]
        rows = [session.get_one(Job, parse_id(one)) for one in (leader, *followers)]
        assert [job_queues.waiting_job(row, row.created_at).is_following for row in rows] == [False, True, True]
    run(hand_worker, leader, "Hello")
    with session_factory() as other, session_factory.begin() as session:
        other.execute(select(Job.id).where(Job.id == parse_id(followers[0])).with_for_update())
        assert [external_id(ended.job_id) for ended in answers.end_followers(session)] == followers[1:], (
            "without a wait"
        )
    with session_factory.begin() as session:
        assert len(answers.end_followers(session)) == 1
        assert answers.end_followers(session) == []
    for follower in followers:
        job = client.get(f"/v1/jobs/{follower}").json()
        assert (job["status"], job["cached"], job["output"]["text"]) == ("completed", True, "Hello")
        assert [event.name for event in all_events(client, follower)][-1] == "job.completed"


def test_the_request_that_runs_is_as_urgent_as_the_most_urgent_that_waits_for_it(
    client: httpx.Client, session_factory: Sessions
) -> None:
    leader = ask(client, priority=-10).json()["id"]
    before = ask(client, prompt="abcd").json()["id"]
    ask(client, priority=5)
    ask(client, priority=-3)
    with session_factory.begin() as session:
        claimed = jobs.claim(session, "large", limit=2, owner=new_id(), model_revision="fake:main", lease_seconds=9)
        assert [external_id(job.id) for job in claimed] == [leader, before]
    assert client.get(f"/v1/jobs/{leader}").json()["priority"] == 5


@pytest.mark.parametrize(("of_leader", "of_follower", "priority"), [(10, 0, 0), (10, 3, 3), (0, 10, 9), (10, 10, 9)])
def test_no_request_gets_a_lead_from_one_that_would_not_have_it(
    api: ApiServer,
    make_tenant: Callable[..., Tenant],
    session_factory: Sessions,
    of_leader: int,
    of_follower: int,
    priority: int,
) -> None:
    tenant_id = make_tenant().id
    with session_factory.begin() as session:
        keys = [tenants.create_key(session, tenant_id) for _ in range(2)]
        for key, max_priority in zip(keys, (of_leader, of_follower), strict=True):
            session.get_one(ApiKey, key.split("_")[1]).max_priority = max_priority
    with api.client(keys[0]) as one, api.client(keys[1]) as other:
        leader = ask(one).json()["id"]
        ask(other, priority=9)
        assert one.get(f"/v1/jobs/{leader}").json()["priority"] == priority


def test_a_start_timeout_is_met_by_the_start_of_the_request_that_is_followed(
    client: httpx.Client, hand_worker: HandWorker, session_factory: Sessions
) -> None:
    leader, follower = (ask(client, start_timeout=60).json()["id"] for _ in range(2))
    running = hand_worker.claim(leader)
    with session_factory.begin() as session:
        session.execute(text("UPDATE jobs SET start_deadline_at = now() - interval '1 second'"))
        assert jobs.expire(session) == []
    hand_worker.finish(running, status=JobStatus.COMPLETED)
    with session_factory.begin() as session:
        assert len(answers.end_followers(session)) == 1
    assert client.get(f"/v1/jobs/{follower}").json()["cached"]


@pytest.mark.parametrize("end", ["cancel", "delete", "fail", "none within an hour"])
def test_the_start_timeout_begins_anew_where_a_request_that_was_started_answers_nobody(
    end: str, client: httpx.Client, hand_worker: HandWorker, session_factory: Sessions
) -> None:
    leader, *followers = (ask(client, start_timeout=60).json()["id"] for _ in range(4))
    running = hand_worker.claim(leader)
    with session_factory.begin() as session:
        session.execute(text("UPDATE jobs SET created_at = created_at - interval '10 minutes'"))
        session.execute(text("UPDATE jobs SET start_deadline_at = created_at + interval '1 minute'"))
        if end == "none within an hour":
            session.execute(text("UPDATE jobs SET available_at = created_at"))
    if end == "delete":
        client.delete(f"/v1/jobs/{leader}")
    elif end != "none within an hour":
        error = JobError(code="engine_error", message="of ours", retryable=False) if end == "fail" else None
        hand_worker.finish(running, status=JobStatus.FAILED if error else JobStatus.CANCELLED, error=error)
    for _ in followers:
        with session_factory.begin() as session:
            assert jobs.expire(session) == []
            answers.end_followers(session, limit=1)
            assert jobs.expire(session) == []
    with session_factory() as session:
        left = session.scalars(
            select(func.extract("epoch", Job.start_deadline_at - func.now())).where(Job.status == JobStatus.QUEUED)
        ).all()
    assert len(left) == len(followers)
    assert all(0 < seconds <= 60 for seconds in left), "each was given a minute once"
    run(hand_worker, followers[0], "Hello")


@pytest.mark.parametrize("end", ["cancel", "delete", "fail"])
def test_followers_go_on_without_their_leader(
    end: str, client: httpx.Client, hand_worker: HandWorker, session_factory: Sessions
) -> None:
    leader, follower, cancelled = (ask(client).json()["id"] for _ in range(3))
    assert client.post(f"/v1/jobs/{cancelled}/cancel").json()["status"] == "cancelled"
    if end == "cancel":
        client.post(f"/v1/jobs/{leader}/cancel")
    elif end == "delete":
        client.delete(f"/v1/jobs/{leader}")
    else:
        error = JobError(code="engine_error", message="of ours", retryable=False)
        hand_worker.finish(hand_worker.claim(leader), status=JobStatus.FAILED, error=error)
    with session_factory.begin() as session:
        assert answers.end_followers(session) == []
        assert session.scalar(text("SELECT count(*) FROM job_followers")) == 0
        [row] = session.scalars(select(Job).where(Job.status == "queued"))
        assert row.available_at == row.created_at
        assert row.eta is None, "it did not wait for a slot only"
    assert waiting(session_factory) == 1
    run(hand_worker, follower, "Hello")
    assert client.get(f"/v1/jobs/{follower}").json()["cached"] is False


@pytest.mark.parametrize("end", ["cancel", "cancel while it runs", "delete", "expire", "fail"])
def test_one_follower_leads_the_others_when_their_leader_is_cancelled(
    end: str, client: httpx.Client, hand_worker: HandWorker, session_factory: Sessions
) -> None:
    leader, cancelled, *followers = (ask(client).json()["id"] for _ in range(5))
    client.post(f"/v1/jobs/{cancelled}/cancel")
    if end == "cancel while it runs":
        hand_worker.claim(leader)
    if "cancel" in end:
        client.post(f"/v1/jobs/{leader}/cancel")
    elif end == "delete":
        client.delete(f"/v1/jobs/{leader}")
    elif end == "expire":
        hand_worker.finish(hand_worker.claim(leader), status=JobStatus.EXPIRED)
    else:
        error = JobError(code="engine_error", message="of ours", retryable=False)
        hand_worker.finish(hand_worker.claim(leader), status=JobStatus.FAILED, error=error)
    for _ in followers:
        with session_factory.begin() as session:
            answers.end_followers(session, limit=1)
    if end == "fail":
        assert waiting(session_factory) == len(followers)
        return
    assert waiting(session_factory) == 1, "one of them runs"
    late = ask(client).json()["id"]
    if end != "delete":
        assert waiting(session_factory) == 1, "who asks now follows it, too"
        followers.append(late)
    run(hand_worker, followers[0], "Hello")
    with session_factory.begin() as session:
        assert {external_id(ended.job_id) for ended in answers.end_followers(session)} == set(followers[1:])


def waiting(sessions: Sessions) -> int:
    """How many jobs could be claimed now."""
    with sessions() as session:
        return session.scalar(text("SELECT count(*) FROM jobs WHERE status = 'queued' AND available_at <= now()")) or 0


CHAT = {"model": "large", "messages": [{"role": "user", "content": "Hi"}], "temperature": 0, "max_tokens": 4}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"model": "large", "prompt": "a", "temperature": 0, "max_tokens": 4},
    "/v1/responses": {"model": "large", "input": "Hi", "temperature": 0, "max_output_tokens": 4},
    "/v1/messages": CHAT,
    "/generate": {"model": "large", "prompt": "b", "temperature": 0, "max_tokens": 4},
    "/api/v1/infer": {"model": "large", "prompt": "c", "temperature": 0, "max_tokens": 4},
}


def test_every_route_is_answered_from_it_without_another_query(
    client: httpx.Client, hand_worker: HandWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def read(*args: object, **fields: object) -> None:
        raise AssertionError("a hit is answered from what its accept returned")

    for path, body in BODIES.items():
        is_stream = path != "/generate" and path != "/api/v1/infer"
        key = {"x-on-disconnect": "continue"}
        if is_stream:
            with client.stream("POST", path, json=body | {"stream": True}, headers=key) as first:
                assert first.headers["x-celeriac-cache"] in ("hit", "miss"), path
                job_id = first.headers["x-job-id"]
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(path, json=body, headers=key, timeout=2)
            job_id = client.get("/v1/jobs").json()["data"][0]["id"]
        if client.get(f"/v1/jobs/{job_id}").json()["status"] == "queued":
            run(hand_worker, job_id, f"Answer {path}")
        with monkeypatch.context() as patched:
            patched.setattr(Services, "read", read)
            patched.setattr(StreamReader, "read", read)
            answer = client.post(path, json=body)
        assert (answer.status_code, answer.headers["x-celeriac-cache"]) == (200, "hit"), (path, answer.text)
        assert "Answer " in answer.text
        bypassed = client.stream("POST", path, json=body | {"use_cache": False, "stream": True}) if is_stream else None
        if bypassed is not None:
            with bypassed as streaming:
                assert "x-celeriac-cache" not in streaming.headers
    infer = client.post("/api/v1/infer", json=BODIES["/api/v1/infer"]).json()
    assert infer["cached"] is True
