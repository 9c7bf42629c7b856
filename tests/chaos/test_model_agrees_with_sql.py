"""The model and the statements are the same protocol: random walks through the model, each step done in SQL too."""

import random
from collections.abc import Callable
from datetime import UTC, datetime
from uuid import UUID, uuid5

import pytest
from sqlalchemy import func, select, text
from sqlalchemy.orm import Session, sessionmaker

from domain.jobs import JobStatus, Usage, new_id
from domain.requests import GenerationRequest, GenerationResult, SamplingParams, TokenChunk
from storage import job_accept, jobs, workers
from storage.job_accept import AcceptOutcome, NewJob
from storage.jobs import ChunkCommit, Finalisation
from storage.tables import DEFAULT_TENANT_ID, Job, JobChunk, JobResult, TenantLoad
from storage.workers import WorkerReport
from tests.chaos.model import Budget, Protocol, State, Step, Worker, is_terminal, steps, text_of

MODEL = "test-model"
NUM_STEPS = 60
BUDGET = Budget(kills=3, lapses=3, flushes=2, lost_answers=3, api_kills=1, releases=2, cancels=1, errors=1, upgrades=2)
#: What happens outside the database.
ELSEWHERE = {
    "push",
    "kill API",
    "kill worker",
    "flush Redis",
    "take a message",
    "find nothing to claim",
    "generate",
    "subscribe",
    "read log",
    "receive",
    "find a gap",
    "break the silence",
    "upgrade",
}


class Table:
    """Does the steps of the model to one real job."""

    def __init__(self, sessions: sessionmaker[Session]) -> None:
        self._sessions = sessions
        self._job_id = new_id()

    def do(self, before: State, step: Step) -> None:
        name, _, _ = step.name.partition(", answer lost")
        if name in ELSEWHERE:
            return
        verb, _, _ = name.partition(": fenced")
        act: Callable[[Session, State, Step], None] = getattr(self, "_" + verb.replace(" ", "_"))
        with self._sessions.begin() as session:
            act(session, before, step)

    def row(self) -> dict[str, object]:
        with self._sessions() as session:
            job = session.get(Job, self._job_id)
            chunks = session.scalars(
                select(JobChunk).where(JobChunk.job_id == self._job_id).order_by(JobChunk.sequence_number)
            ).all()
            result = session.scalar(select(JobResult.result).where(JobResult.job_id == self._job_id))
            load = session.get_one(TenantLoad, DEFAULT_TENANT_ID)
            now = session.scalar(select(func.clock_timestamp()))
        assert now is not None
        if job is None:
            return {"status": None, "running": load.num_running, "queued": load.num_queued}
        first = max(job.reset_sequence_number, 1)
        assert [chunk.sequence_number for chunk in chunks] == list(range(first, job.committed_sequence_number + 1))
        assert [chunk.sequence_number for chunk in chunks if chunk.chunk.is_reset] == [job.reset_sequence_number][
            : job.reset_sequence_number
        ]
        tokens = tuple(token for chunk in chunks for token in chunk.chunk.token_ids)
        assert job.num_committed_tokens == len(tokens)
        return {
            "status": job.status,
            "attempt": job.attempt,
            "chunks": tokens,
            "committed_sequence_number": job.committed_sequence_number,
            "revision": job.model_revision,
            "is_lease_valid": job.lease_expires_at is not None and job.lease_expires_at > now,
            "is_cancel_requested": job.cancel_requested_at is not None,
            "num_failures": job.num_failures,
            "result": _text_of(result) if isinstance(result, GenerationResult) else "",
            "running": load.num_running,
            "queued": load.num_queued,
        }

    def _accept(self, session: Session, before: State, step: Step) -> None:
        new_job = NewJob(
            id=self._job_id,
            tenant_id=DEFAULT_TENANT_ID,
            request=GenerationRequest(model=MODEL, prompt="a", params=SamplingParams(max_tokens=2)),
            prompt_token_ids=[1],
            model_revision="0",
            max_tokens=2,
            seed=7,
            max_failures=Protocol().max_failures,
            result_ttl_seconds=3600,
            request_hash=b"hash",
        )
        outcome = job_accept.accept(session, [new_job], max_queued_jobs=1000)[0].outcome
        assert outcome is (AcceptOutcome.ACCEPTED if before.status is None else AcceptOutcome.DUPLICATE)

    def _find_a_message_missing(self, session: Session, before: State, step: Step) -> None:
        served = [str(before.served)]
        assert jobs.claimable_soon(session, MODEL, model_revisions=served, limit=9) == [self._job_id]

    def _lease_lapses(self, session: Session, before: State, step: Step) -> None:
        statement = "UPDATE jobs SET lease_expires_at = now() - interval '1 hour' WHERE id = :id"
        session.execute(text(statement), {"id": self._job_id})

    _lease_lapses_under_its_owner = _lease_lapses

    def _rescue(self, session: Session, before: State, step: Step) -> None:
        assert [
            job.job_id for job in jobs.rescue(session, as_of=datetime.now(UTC), grace_seconds=0, quiet_seconds=0)
        ] == [self._job_id]
        self._skip_delay(session)

    def _cancel(self, session: Session, before: State, step: Step) -> None:
        cancelled = jobs.cancel(session, self._job_id, DEFAULT_TENANT_ID)
        assert cancelled is not None
        assert cancelled.status == step.after.status

    def _claim(self, session: Session, before: State, step: Step) -> None:
        owner = self._owner(step.after.attempt)
        revision = str(before.served)
        claimed = jobs.claim(session, MODEL, limit=2, owner=owner, model_revision=revision, lease_seconds=3600)
        prefix = tuple(token for chunk in claimed[0].committed_chunks for token in chunk.token_ids)
        assert (claimed[0].attempt, prefix) == (step.after.attempt, text_of(before.chunks))

    def _restart(self, session: Session, before: State, step: Step) -> None:
        worker = new_id()
        report = WorkerReport(worker, "gpu@here", MODEL, 8, 0, 0.0, model_revision=str(before.served))
        workers.heartbeat(session, report)
        restarted = jobs.restart(session, MODEL, str(before.revision), live_seconds=60)
        assert [job.job_id for job in restarted] == [self._job_id]
        workers.forget(session, worker)

    def _commit(self, session: Session, before: State, step: Step) -> None:
        worker = _actor(before, step)
        news = list(enumerate(worker.text, start=worker.base + 1))[worker.num_committed :]
        chunks = [TokenChunk(sequence_number=place, text=f"{token} ", token_ids=(token,)) for place, token in news]
        held = jobs.commit_chunks(session, [ChunkCommit(self._job_id, worker.attempt, chunks)], lease_seconds=3600)
        assert [job.is_cancel_requested for job in held] == self._held(before, step)

    def _renew(self, session: Session, before: State, step: Step) -> None:
        held = jobs.renew(session, [self._job_id], owner=self._owner(step.by_attempt), lease_seconds=3600)
        assert [job.is_cancel_requested for job in held] == self._held(before, step)

    def _finalise(self, session: Session, before: State, step: Step) -> None:
        worker = _actor(before, step)
        if step.name.endswith("fenced"):
            status = JobStatus.FAILED if before.status == "completed" else JobStatus.COMPLETED  # no repeated call
        else:
            status = JobStatus(step.after.status or "")
        # A result without choices would do as well; without one, the committed chunks are to become it.
        result = GenerationResult(choices=(), usage=Usage()) if not worker.num_committed else None
        last = worker.base + worker.num_committed
        ending = Finalisation(self._job_id, worker.attempt, last, status, result)
        assert jobs.finalise(session, [ending]) == ([] if step.name.endswith("fenced") else [self._job_id])

    _finalise_completed = _finalise_cancelled = _finalise_failed = _finalise

    def _release(self, session: Session, before: State, step: Step) -> None:
        jobs.release(session, [self._job_id], owner=self._owner(step.by_attempt))

    def _engine_crash(self, session: Session, before: State, step: Step) -> None:
        jobs.report_crash(session, {self._job_id: 0}, owner=self._owner(step.by_attempt))
        self._skip_delay(session)

    def _skip_delay(self, session: Session) -> None:
        session.execute(text("UPDATE jobs SET available_at = created_at WHERE id = :id"), {"id": self._job_id})

    def _owner(self, attempt: int) -> UUID:
        return uuid5(self._job_id, str(attempt))

    def _held(self, before: State, step: Step) -> list[bool]:
        return [] if step.name.endswith("fenced") else [before.is_cancel_requested]


def _actor(before: State, step: Step) -> Worker:
    return next(w for w in before.workers if isinstance(w, Worker) and w.attempt == step.by_attempt)


def _text_of(result: GenerationResult) -> str:
    return "".join(choice.text for choice in result.choices)


def _expected_row(state: State) -> dict[str, object]:
    queued, running = int(state.status == "queued"), int(state.status == "in_progress")
    if state.status is None:
        return {"status": None, "running": running, "queued": queued}
    return {
        "status": state.status,
        "attempt": state.attempt,
        "chunks": text_of(state.chunks),
        "committed_sequence_number": len(state.chunks),
        "revision": str(state.revision),
        "is_lease_valid": state.is_lease_valid,
        "is_cancel_requested": state.is_cancel_requested,
        "num_failures": state.num_failures,
        "result": "".join(f"{token} " for token in state.result or ()),
        "running": running,
        "queued": queued,
    }


@pytest.mark.parametrize("seed", range(4))
def test_every_step_of_the_model_does_the_same_to_a_real_job(seed: int, session_factory: sessionmaker[Session]) -> None:
    chooser = random.Random(seed)
    for _ in range(12):
        table, state = Table(session_factory), State(budget=BUDGET)
        trace: list[str] = []
        for _ in range(NUM_STEPS):
            choices = list(steps(state, Protocol()))
            if not choices:
                break
            step = chooser.choice(choices)
            trace.append(step.name)
            table.do(state, step)
            assert table.row() == _expected_row(step.after), trace
            state = step.after
        with session_factory.begin() as session:  # the next walk counts from zero
            jobs.delete(session, table._job_id, DEFAULT_TENANT_ID)
        assert is_terminal(state.status) or len(trace) == NUM_STEPS
