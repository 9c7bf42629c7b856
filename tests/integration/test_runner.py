"""JobRunner on real parts: what is offered runs to its end, and SQL, the events and the live channel agree on it."""

import signal
from datetime import UTC, datetime, timedelta
from threading import Event
from uuid import UUID, uuid4

import pytest
from sqlalchemy import make_url, text
from sqlalchemy.orm import Session, sessionmaker

from domain.jobs import FinishReason, JobStatus, WorkerState
from domain.requests import SamplingParams, TokenChunk
from gpu_worker import intake, threads
from gpu_worker.engine.fake_tokens import fake_text
from gpu_worker.threads import RunnerEventKind
from storage import jobs, workers
from storage.jobs import ChunkCommit
from tests.integration.runner_harness import PROMPT, RecordingRunner, Rig, listening
from tests.storage_samples import claim_these
from tests.waiting import wait_until

pytestmark = pytest.mark.slow

CLAIMED, ENDED, REFUSED, RELEASED = (
    RunnerEventKind.CLAIMED,
    RunnerEventKind.ENDED,
    RunnerEventKind.REFUSED,
    RunnerEventKind.RELEASED,
)
LONG = 3000  # tokens: longer than any of these tests waits


def test_offered_jobs_run_to_completion_and_their_chunks_are_their_results(rig: Rig) -> None:
    job_ids = rig.add_jobs(20)  # more than slots
    worker = rig.start()
    worker.offer(job_ids)
    worker.wait_for(ENDED, job_ids)
    for job_id in job_ids:
        rig.assert_intact(job_id)
        assert worker.story(job_id) == [CLAIMED, ENDED]
    assert worker.runner.stats().num_running == 0
    assert worker.runner.num_free == 8


def test_jobs_of_a_claim_that_failed_after_its_commit_are_released_at_once(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id, worker, read = rig.add_job(), rig.start(), jobs.claimed_jobs

    def fail_once(*arguments: object, **more: object) -> list[jobs.ClaimedJob]:
        monkeypatch.setattr(jobs, "claimed_jobs", read)
        raise RuntimeError("a row that nobody expected")

    monkeypatch.setattr(jobs, "claimed_jobs", fail_once)
    worker.offer([job_id])
    worker.wait_for(ENDED, [job_id])
    job = rig.job(job_id)
    assert (job.status, job.attempt, job.num_failures) == (JobStatus.COMPLETED, 2, 0)


def test_what_is_published_is_what_was_committed_in_the_same_order(rig: Rig) -> None:
    job_id = rig.add_job(max_tokens=60)
    worker = rig.start()
    with listening(rig.settings.redis_url, job_id) as read:
        worker.offer([job_id])
        wait_until(lambda: {"status": "completed"} in read(), "the end is published")
    heard = read()
    assert heard[0] == {"status": "in_progress", "attempt": 1}
    assert [TokenChunk.model_validate(message["chunk"]) for message in heard[1:-1]] == rig.chunks(job_id)
    assert len(heard) > 3, "a stream, not one lump"


def test_each_of_n_sequences_streams_under_its_index(rig: Rig) -> None:
    job_id = rig.add_job(params=SamplingParams(n=3))
    worker = rig.start()
    worker.offer([job_id])
    worker.wait_for(ENDED, [job_id])
    rig.assert_intact(job_id)
    result = rig.result(job_id)
    assert len({choice.text for choice in result.choices}) == 3
    assert result.usage.completion_tokens == 3 * 20
    assert result.usage.prompt_tokens == len(PROMPT)


def test_a_stop_string_ends_the_text_before_itself(rig: Rig) -> None:
    text = fake_text(PROMPT, 7, 0, 20)
    stop = text[30:34]
    job_id = rig.add_job(params=SamplingParams(stop=(stop,)), seed=7)
    worker = rig.start()
    worker.offer([job_id])
    worker.wait_for(ENDED, [job_id])
    choice = rig.result(job_id).choices[0]
    assert choice.text == text[: text.index(stop)]
    assert choice.finish_reason is FinishReason.STOP
    assert "".join(chunk.text for chunk in rig.chunks(job_id)) == choice.text


def test_a_scored_job_and_the_best_of_several_survive_a_killed_engine(rig: Rig) -> None:
    scoring = SamplingParams(max_tokens=0, prompt_logprobs=1)
    job_ids = [rig.add_job(params=SamplingParams(best_of=4, n=2, prompt_logprobs=0), max_tokens=200)]
    worker = rig.start()
    worker.offer(job_ids)
    rig.wait_for_tokens(job_ids, 40)
    worker.signal_engine(signal.SIGKILL)
    worker.wait_for(RELEASED, job_ids)
    job_ids.append(rig.add_job(params=scoring, max_tokens=0))
    worker.wait_until_ready()
    worker.offer(job_ids)
    worker.wait_for(ENDED, job_ids)
    best, scored = map(rig.result, job_ids)
    assert [choice.index for choice in best.choices] == [0, 1]
    for choice in best.choices:
        assert choice.candidate is not None
        assert choice.text == fake_text(PROMPT, rig.job(job_ids[0]).seed, choice.candidate, 200)
    assert best.usage.completion_tokens == 4 * 200
    assert rig.job(job_ids[0]).attempt == 2
    for result in (best, scored):
        assert result.prompt_logprobs is not None
        assert [entry and entry.token_id for entry in result.prompt_logprobs] == [None, *PROMPT[1:]]
    assert (scored.choices[0].text, scored.choices[0].finish_reason, scored.usage.completion_tokens) == (
        "",
        "length",
        0,
    )


def test_a_ticket_lets_the_job_in_whose_turn_it_is(rig: Rig) -> None:
    """Whichever it names: the urgent one came last."""
    rig.write_catalog(max_num_seqs=2)
    low = rig.add_jobs(14, priority=-5, max_tokens=60)
    worker = rig.start()
    worker.offer(low)
    wait_until(lambda: len(claims_of(worker)) == 2, "the slots are taken")
    urgent = rig.add_job(priority=5)
    worker.offer([urgent])
    worker.wait_for(ENDED, [*low, urgent])
    assert urgent in claims_of(worker)[:4]  # a claim may have been under way


def claims_of(worker: RecordingRunner) -> list[UUID]:
    return [event.job_id for event in worker.events if event.kind is CLAIMED]


def test_a_ticket_without_a_job_is_spent(rig: Rig) -> None:
    rig.add_job(status=JobStatus.COMPLETED)
    rig.add_job(status=JobStatus.IN_PROGRESS)
    worker = rig.start()
    worker.offer([uuid4(), uuid4(), uuid4()])
    wait_until(lambda: worker.num_spent() == 3, "all are spent")
    assert claims_of(worker) == []


@pytest.fixture
def quick_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "POLL_SECONDS", 0.1)


@pytest.mark.usefixtures("quick_polls")
def test_without_a_queue_jobs_are_found_in_sql(rig: Rig) -> None:
    worker = rig.start()
    job_id = rig.add_job()
    worker.wait_for(ENDED, [job_id])
    rig.assert_intact(job_id)


@pytest.mark.usefixtures("quick_polls")
def test_the_late_ticket_of_a_job_found_in_sql_is_spent(rig: Rig) -> None:
    job_id = rig.add_job(max_tokens=LONG)
    worker = rig.start()
    worker.wait_for(CLAIMED, [job_id])
    worker.offer([job_id])
    wait_until(lambda: worker.num_spent() == 1, "the ticket is spent")
    worker.runner.cancel(job_id)
    worker.wait_for(ENDED, [job_id])
    assert worker.story(job_id) == [CLAIMED, ENDED]
    assert rig.job(job_id).attempt == 1


def test_cancelling_a_running_job_keeps_its_output_and_ends_it_once(rig: Rig) -> None:
    job_id, neighbour = rig.add_job(max_tokens=LONG), rig.add_job(max_tokens=100)
    worker = rig.start()
    worker.offer([job_id, neighbour])
    rig.wait_for_tokens([job_id])
    worker.runner.cancel(job_id)
    worker.runner.cancel(job_id)
    worker.wait_for(ENDED, [job_id, neighbour])
    assert_cut_off(rig, worker, job_id, JobStatus.CANCELLED, FinishReason.CANCELLED)
    rig.assert_intact(neighbour)


def test_a_cancel_written_to_sql_by_somebody_else_stops_the_job(rig: Rig, session: Session) -> None:
    job_id = rig.add_job(params=SamplingParams(n=2), max_tokens=LONG)
    worker = rig.start()
    worker.offer([job_id])
    rig.wait_for_tokens([job_id])
    jobs.request_cancel(session, [job_id])
    session.commit()
    worker.wait_for(ENDED, [job_id])
    assert_cut_off(rig, worker, job_id, JobStatus.CANCELLED, FinishReason.CANCELLED)


def test_a_job_cancelled_in_the_queue_never_starts(rig: Rig) -> None:
    rig.write_catalog(max_num_seqs=1)
    running, queued = rig.add_job(max_tokens=LONG), rig.add_job()
    worker = rig.start()
    worker.offer([running, queued])
    rig.wait_for_tokens([running])
    worker.runner.cancel_queued([running, queued])
    wait_until(lambda: rig.job(queued).status is JobStatus.CANCELLED, "the waiting job is cancelled")
    worker.runner.cancel(running)
    worker.wait_for(ENDED, [running])
    wait_until(lambda: worker.num_spent() == 2, "both tickets are spent")
    assert worker.story(queued) == []
    assert worker.ends(running) == [JobStatus.CANCELLED]


def test_a_deadline_in_mid_run_expires_the_job_and_keeps_its_output(rig: Rig) -> None:
    worker = rig.start()
    job_id = rig.add_job(max_tokens=LONG, deadline_at=datetime.now(UTC) + timedelta(seconds=3))
    worker.offer([job_id])
    worker.wait_for(ENDED, [job_id])
    assert_cut_off(rig, worker, job_id, JobStatus.EXPIRED, FinishReason.DEADLINE)
    error = rig.job(job_id).error
    assert error is not None
    assert error.code == "deadline_exceeded"


def test_a_job_that_the_engine_cannot_run_fails_alone(rig: Rig) -> None:
    rig.write_catalog(fail_at_token=5, fail_seed=13)
    neighbours = rig.add_jobs(3)
    failing = rig.add_job(seed=13)
    worker = rig.start()
    worker.offer([failing, *neighbours])
    worker.wait_for(ENDED, [failing, *neighbours])
    job = rig.job(failing)
    assert job.status is JobStatus.FAILED
    assert job.error is not None
    assert job.error.code == "engine_error"
    assert worker.ends(failing) == [JobStatus.FAILED]
    for job_id in neighbours:
        rig.assert_intact(job_id)


def test_a_job_whose_text_was_complete_already_is_finalised_without_the_engine(rig: Rig, session: Session) -> None:
    job_id, other = rig.add_job(max_tokens=2), uuid4()
    claim_these(session, [job_id], owner=other, model_revision="fake:main", lease_seconds=60)
    last = TokenChunk(sequence_number=1, text="ba do", token_ids=(1, 2), finish_reason=FinishReason.LENGTH)
    jobs.commit_chunks(session, [ChunkCommit(job_id, 1, [last])], lease_seconds=60)
    jobs.release(session, [job_id], owner=other)
    session.commit()
    worker = rig.start()
    worker.offer([job_id])
    worker.wait_for(ENDED, [job_id])
    job = rig.job(job_id)
    assert (job.status, job.attempt) == (JobStatus.COMPLETED, 2)
    assert rig.chunks(job_id) == [last]
    assert rig.result(job_id).choices[0].text == "ba do"
    assert worker.runner.stats().engine["num_steps"] == 0


def test_a_drain_claims_nothing_more_and_lets_running_jobs_end(rig: Rig) -> None:
    running, offered = rig.add_job(max_tokens=100), rig.add_jobs(3)
    worker = rig.start()
    worker.offer([running])
    worker.wait_for(CLAIMED, [running])
    worker.runner.begin_drain(release_after_seconds=30)
    wait_until(lambda: worker.runner.stats().state is WorkerState.DRAINING, "the drain has begun")
    worker.offer(offered)
    worker.wait_for(ENDED, [running])
    rig.assert_intact(running)
    assert worker.runner.num_free == 0
    assert worker.runner.withdraw() == offered


def test_an_ordered_drain_holds_for_the_name_until_it_is_taken_back(rig: Rig) -> None:
    """Whoever comes back under the name drains on, and it does not matter who takes the order back."""
    running, offered = rig.add_job(max_tokens=100), rig.add_jobs(3)
    worker = rig.start()
    worker.offer([running])
    worker.wait_for(CLAIMED, [running])
    worker.runner.order_drain(release_after_seconds=30)
    wait_until(lambda: worker.runner.stats().state is WorkerState.DRAINING, "the order is obeyed")
    worker.offer(offered)
    worker.wait_for(REFUSED, offered)
    worker.wait_for(ENDED, [running])
    rig.assert_intact(running)

    again = rig.start(wait=False)
    wait_until(lambda: again.runner.stats().state is WorkerState.DRAINING, "the order is kept")
    with rig.sessions.begin() as session:
        assert workers.resume(session, "gpu@test")
    both = (worker.runner, again.runner)
    wait_until(lambda: {each.stats().state for each in both} == {WorkerState.READY}, "they take jobs again")
    worker.runner.order_resume()  # of what is not drained: nothing happens
    worker.offer(offered)
    worker.wait_for(ENDED, offered)


def test_what_outlasts_a_drain_is_released_uncharged_and_goes_on_elsewhere(rig: Rig) -> None:
    first, second = rig.start(), rig.start()
    job_id = rig.add_job(max_tokens=1000)
    first.offer([job_id])
    rig.wait_for_tokens([job_id])
    first.runner.begin_drain(release_after_seconds=0)
    first.wait_for(RELEASED, [job_id])
    second.offer([job_id])
    second.wait_for(ENDED, [job_id])
    assert (rig.job(job_id).attempt, rig.job(job_id).num_failures) == (2, 0)
    assert set(rig.attempts_of_chunks(job_id)) == {1, 2}
    rig.assert_intact(job_id)


def test_stopping_releases_what_runs_and_takes_the_worker_off_the_list(rig: Rig, session: Session) -> None:
    job_id = rig.add_job(max_tokens=LONG)
    worker = rig.start()
    worker.offer([job_id])
    rig.wait_for_tokens([job_id])
    assert [live.id for live in workers.list_live(session)] == [worker.owner]
    worker.runner.stop(release=True)
    assert worker.story(job_id) == [CLAIMED, RELEASED]
    job = rig.job(job_id)
    assert (job.status, job.num_failures) == (JobStatus.QUEUED, 0)
    assert job.num_committed_tokens == sum(len(chunk.token_ids) for chunk in rig.chunks(job_id)) > 0
    session.rollback()
    assert workers.list_live(session) == []


def test_two_workers_offered_the_same_jobs_run_each_of_them_once(rig: Rig) -> None:
    pair = [rig.start(), rig.start()]
    job_ids = rig.add_jobs(40)
    for worker in pair:
        worker.offer(job_ids)
    wait_until(lambda: all(rig.job(job_id).status.is_terminal for job_id in job_ids), "all jobs have ended")
    wait_until(lambda: all(worker.num_spent() == 40 for worker in pair), "all tickets are spent")
    for job_id in job_ids:
        rig.assert_intact(job_id)
        assert rig.job(job_id).attempt == 1
        told = pair[0].story(job_id) + pair[1].story(job_id)
        assert told == [CLAIMED, ENDED]


def assert_cut_off(rig: Rig, worker: RecordingRunner, job_id: object, status: JobStatus, reason: FinishReason) -> None:
    """Ended once, so, with what it had as its result."""
    job, chunks, result = rig.job(job_id), rig.chunks(job_id), rig.result(job_id)  # type: ignore[arg-type]
    assert (job.status, job.finish_reason, worker.ends(job.id)) == (status, reason, [status])
    for choice in result.choices:
        text = "".join(chunk.text for chunk in chunks if chunk.index == choice.index)
        assert choice.text == text == fake_text(PROMPT, job.seed, choice.index, choice.num_tokens)
        assert 0 < choice.num_tokens < job.max_tokens
        assert choice.finish_reason is reason


def test_a_dispatch_that_outlasts_its_runner_leaves_no_connection_open(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_begun, may_end = Event(), Event()

    def slow_dispatch(sessions: sessionmaker[Session], *_: object) -> None:
        with sessions.begin() as session:
            session.execute(text("SELECT 1"))
            has_begun.set()
            may_end.wait()

    monkeypatch.setattr(threads, "dispatch", slow_dispatch)
    url = make_url(rig.settings.database_url).update_query_dict({"application_name": "the worker"})
    worker = rig.start(database_url=url.render_as_string(hide_password=False))
    requester = worker.runner._runner._dispatcher
    requester.request()
    wait_until(has_begun.is_set, "the dispatch has begun")
    worker.runner.stop(release=True)
    assert _num_connections(rig, "the worker") == 1
    may_end.set()
    requester._thread.join()
    wait_until(lambda: _num_connections(rig, "the worker") == 0, "its connections are closed")


def _num_connections(rig: Rig, name: str) -> int:
    statement = text("SELECT count(*) FROM pg_stat_activity WHERE application_name = :name")
    with rig.sessions() as session:
        return int(session.execute(statement, {"name": name}).scalar_one())
