"""Dead letters, replay and retry over HTTP: what went wrong is told, and another try is another job."""

from functools import partial
from uuid import uuid4

import httpx
import pytest
from pydantic import TypeAdapter
from sqlalchemy.orm import Session, sessionmaker

from dialects.native import AttemptView, DeadLetterListView, JobView
from domain.jobs import FinishReason, JobError, JobStatus, Lane, parse_id
from storage import job_queries, jobs
from storage.jobs import ClaimedJob
from storage.tables import Job
from tests.integration.api_harness import HandWorker, all_events, body, make_chunk, post_job
from tests.waiting import wait_until

ENGINE_ERROR = JobError(code="engine_error", message="it could not be run")


def fail(hand_worker: HandWorker, job_id: str) -> ClaimedJob:
    job = hand_worker.claim(job_id)
    hand_worker.finish(job, status=JobStatus.FAILED, error=ENGINE_ERROR)
    return job


def claim_from(session_factory: sessionmaker[Session], hand_worker: HandWorker, lane: Lane) -> list[ClaimedJob]:
    with session_factory.begin() as session:
        return jobs.claim(
            session, "fake", limit=1, owner=hand_worker.owner, model_revision="fake:main", lease_seconds=60, lane=lane
        )


def poison(session_factory: sessionmaker[Session], hand_worker: HandWorker, job_id: str) -> None:
    """It crashes two engines, the second one alone."""
    for lane in (Lane.STANDARD, Lane.ISOLATED):
        wait_until(partial(claim_from, session_factory, hand_worker, lane))  # a dispatch may hold its row
        with session_factory.begin() as session:
            jobs.report_crash(session, {parse_id(job_id): 2}, owner=hand_worker.owner)


def attempts_of(http: httpx.Client, job_id: str) -> list[AttemptView]:
    job = TypeAdapter(JobView).validate_json(http.get(f"/v1/jobs/{job_id}?include=attempts").content)
    return job["attempts"] or []


def test_a_job_tells_its_attempts(http: httpx.Client, hand_worker: HandWorker) -> None:
    job_id = post_job(http)["id"]
    first = hand_worker.claim(job_id)
    hand_worker.say(first, "Good ")
    hand_worker.release(first)
    second = hand_worker.claim(job_id)
    running = attempts_of(http, job_id)
    hand_worker.finish(second, "Good ")
    ended = attempts_of(http, job_id)
    assert [(one["attempt"], one["outcome"], one["num_tokens"]) for one in running] == [
        (1, "released", 5),
        (2, None, 0),
    ]
    assert [(one["attempt"], one["outcome"]) for one in ended] == [(1, "released"), (2, "completed")]
    assert all(one["ended_at"] is not None and one["ended_at"] >= one["started_at"] for one in ended)
    assert "attempts" not in http.get(f"/v1/jobs/{job_id}").json()


def test_dead_letters_are_the_failed_jobs_in_pages(http: httpx.Client, hand_worker: HandWorker) -> None:
    hand_worker.run(post_job(http)["id"], "Good")
    failed = [post_job(http)["id"] for _ in range(3)]
    for job_id in failed:
        fail(hand_worker, job_id)
    page = TypeAdapter(DeadLetterListView).validate_json(http.get("/v1/dead_letters?limit=2").content)
    rest = TypeAdapter(DeadLetterListView).validate_json(http.get(f"/v1/dead_letters?after={page['last_id']}").content)
    assert [job["id"] for job in (*page["data"], *rest["data"])] == failed[::-1]
    assert (page["has_more"], rest["has_more"]) == (True, False)
    [attempt] = page["data"][0]["attempts"] or []
    assert (attempt["outcome"], attempt["error_code"]) == ("failed", "engine_error")


def test_a_replay_is_a_new_job_with_the_same_request_once(http: httpx.Client, hand_worker: HandWorker) -> None:
    job_id = post_job(http, metadata={"a": "b"}, priority=2)["id"]
    fail(hand_worker, job_id)
    answers = [http.post(f"/v1/dead_letters/{job_id}/replay") for _ in range(2)]
    first, again = (TypeAdapter(JobView).validate_json(answer.content) for answer in answers)
    assert answers[0].status_code == 202
    assert again["id"] == first["id"] != job_id
    assert answers[1].headers["idempotent-replayed"] == "true"
    assert (first["retry_of"], first["metadata"], first["priority"]) == (job_id, {"a": "b"}, 2)
    inputs = [http.get(f"/v1/jobs/{id_}?include=input").json()["input"] for id_ in (job_id, first["id"])]
    assert inputs[0] == inputs[1]
    hand_worker.run(first["id"], "Good")


def test_only_the_dead_are_replayed_and_only_the_ended_retried(http: httpx.Client, hand_worker: HandWorker) -> None:
    done, waiting = post_job(http)["id"], post_job(http)["id"]
    hand_worker.run(done, "Good")
    for path in (f"dead_letters/{done}/replay", f"jobs/{done}/retry", f"jobs/{waiting}/retry"):
        answer = http.post(f"/v1/{path}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, "job_not_retryable")
    for path in ("dead_letters/job_00000000000000000000000000/replay", "jobs/nonsense/retry"):
        assert http.post(f"/v1/{path}").status_code == 404
    fail(hand_worker, waiting)
    answer = http.post(f"/v1/dead_letters/{waiting}/replay", json={"allow": True})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "allow")


def test_a_poison_request_is_refused_until_it_is_asked_for_by_name(
    http: httpx.Client, hand_worker: HandWorker, session_factory: sessionmaker[Session]
) -> None:
    job_id = post_job(http)["id"]
    poison(session_factory, hand_worker, job_id)
    refused = [http.post("/v1/jobs", json=body()), http.post(f"/v1/jobs/{job_id}/retry")]
    refused.append(http.post(f"/v1/dead_letters/{job_id}/replay"))
    assert [(answer.status_code, answer.json()["error"]["code"]) for answer in refused] == [(422, "poison_request")] * 3
    assert http.post("/v1/jobs", json=body(prompt="Another")).status_code == 202
    replayed = http.post(f"/v1/dead_letters/{job_id}/replay", json={"allow_poison": True})
    assert replayed.status_code == 202
    with session_factory() as session:
        assert session.get_one(Job, parse_id(replayed.json()["id"])).lane is Lane.ISOLATED


def test_a_retry_goes_on_behind_the_old_output_and_its_stream_is_whole(
    http: httpx.Client, hand_worker: HandWorker
) -> None:
    job_id = post_job(http)["id"]
    job = hand_worker.claim(job_id)
    last = make_chunk(3, "cut", finish_reason=FinishReason.CANCELLED)
    hand_worker.commit(job, make_chunk(1, "Good "), make_chunk(2, "day "), last)
    hand_worker.finish(job, "Good ", "day ", "cut", status=JobStatus.CANCELLED)
    old_events = all_events(http, job_id)
    retried = http.post(f"/v1/jobs/{job_id}/retry").json()["id"]
    claimed = hand_worker.claim(retried)
    assert [chunk.text for chunk in claimed.committed_chunks] == ["Good ", "day "], "not what the end brought out"
    hand_worker.say(claimed, "to you", first=3)
    hand_worker.finish(claimed, "Good ", "day ", "to you")
    events = all_events(http, retried)
    assert [event.data["text"] for event in events if event.name == "output.delta"] == ["Good ", "day ", "to you"]
    # The old job's last word stands: who comes back to it sees the same end, and who has seen it is told so.
    assert [event.id for event in all_events(http, job_id)] == [event.id for event in old_events]
    seen = http.get(f"/v1/jobs/{job_id}/events", headers={"last-event-id": "4"})
    assert seen.status_code == 204


def test_a_retry_under_another_revision_starts_anew(
    http: httpx.Client, hand_worker: HandWorker, session_factory: sessionmaker[Session]
) -> None:
    job_id = post_job(http)["id"]
    job = hand_worker.claim(job_id)
    hand_worker.say(job, "Good ")
    hand_worker.finish(job, "Good ", status=JobStatus.FAILED, error=ENGINE_ERROR)
    with session_factory.begin() as session:
        session.get_one(Job, parse_id(job_id)).model_revision = "fake:older"
    retried = http.post(f"/v1/jobs/{job_id}/retry").json()["id"]
    assert hand_worker.claim(retried).committed_chunks == []


@pytest.mark.parametrize("num_poison", [3, 4])
def test_a_tenant_with_more_poison_than_allowed_runs_isolated(
    http: httpx.Client, hand_worker: HandWorker, session_factory: sessionmaker[Session], num_poison: int
) -> None:
    for number in range(num_poison):
        poison(session_factory, hand_worker, post_job(http, prompt=f"poison {number}")["id"])
    job_id = post_job(http, prompt="innocent")["id"]
    with session_factory() as session:
        lane = session.get_one(Job, parse_id(job_id)).lane
    assert lane is (Lane.ISOLATED if num_poison > 3 else Lane.STANDARD)


def test_suspicion_ends_with_sixteen_tokens_of_an_attempt(
    http: httpx.Client, hand_worker: HandWorker, session_factory: sessionmaker[Session]
) -> None:
    job_id = post_job(http)["id"]
    hand_worker.claim(job_id)
    with session_factory.begin() as session:
        jobs.report_crash(session, {parse_id(job_id): 1}, owner=hand_worker.owner)
    suspect = hand_worker.claim(job_id)
    assert suspect.num_suspicions == 1
    for number, (text, num_suspicions) in enumerate([("fifteen tokens.", 1), ("!", 0)], start=1):
        hand_worker.commit(suspect, make_chunk(number, text))
        with session_factory() as session:
            assert session.get_one(Job, parse_id(job_id)).num_suspicions == num_suspicions


def test_a_stranger_sees_no_dead_letter(http: httpx.Client, hand_worker: HandWorker) -> None:
    fail(hand_worker, post_job(http)["id"])
    with hand_worker.sessions() as session:
        assert job_queries.list_dead_letters(session, uuid4(), after=None, limit=9) == []
