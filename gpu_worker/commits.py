"""The worker's transactions: claims, chunks, ends of jobs and heartbeats. What is committed is then published.

`JobStorage` has one method per transaction and notifies open streams after the commit. Its methods block; they run on
the storage thread. `is_repeated` means that an earlier attempt at the same call may have been committed although its
answer was lost. Methods without this parameter are idempotent.

`FlushPacer` decides, on the runner's thread, which jobs' output is due. `commit` stores it, on the storage thread, in
one transaction for all of them. The first chunk of a job and its end are due immediately; the chunks in between wait
for an interval that depends on the cost of commits.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from time import monotonic, time
from uuid import UUID

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from sqlalchemy import select
from sqlalchemy.orm import Session, sessionmaker

from domain.catalog import ModelSpec
from domain.clocks import skew_seconds
from domain.errors import EngineError
from domain.jobs import AttemptOutcome, JobError, JobStatus, Lane
from domain.requests import TokenChunk
from gpu_worker.job import RunningJob
from settings import Settings
from storage import database, jobs, streams, workers
from storage.database import OUTAGES
from storage.jobs import ChunkCommit, ClaimedJob, Finalisation, Held, Returned
from storage.tables import Job
from storage.workers import Orders, WorkerReport
from tasks import job_log
from text.model_files import model_revision

log = logging.getLogger(__name__)

REDIS_TIMEOUT_SECONDS = 0.2

PLAN_SECONDS = 3.0  # for which plans are kept: longer than from one look into SQL to the next while no job comes

REDIS_PAUSE_SECONDS = 1.0  # after a failure, publish nothing for this long; readers fall back to SQL anyway


class StreamNotifier:
    """Publishes committed chunks and changes of status. During a Redis outage, this costs one short timeout per second,
    and readers get their chunks up to a second late."""

    def __init__(self, redis_url: str) -> None:
        self._client = redis.Redis.from_url(
            redis_url,
            socket_timeout=REDIS_TIMEOUT_SECONDS,
            socket_connect_timeout=REDIS_TIMEOUT_SECONDS,
            retry=Retry(NoBackoff(), 0),
        )
        self._paused_until = 0.0

    @property
    def is_paused(self) -> bool:
        return monotonic() < self._paused_until

    def publish(self, events: Iterable[tuple[UUID, streams.Event]]) -> None:
        events = list(events)
        if not events or self.is_paused:
            return
        if not streams.publish(self._client, events):
            self._paused_until = monotonic() + REDIS_PAUSE_SECONDS

    def close(self) -> None:
        self._client.close()


class JobStorage:
    """One worker's transactions, all on one connection and on the storage thread."""

    def __init__(self, settings: Settings, spec: ModelSpec, owner: UUID, worker_name: str) -> None:
        self._worker_name = worker_name
        self._database = database.open_database(
            settings.database_url,
            pool_size=1,
            max_overflow=0,
            idle_seconds=settings.idle_transaction_seconds,
            repeats_calls=True,  # StorageThread does
        )
        # For each chunk, PostgreSQL would plan the check of its foreign key again; and a claim takes longer to plan
        # than to execute, while a client waits for its first token.
        database.keep_plans(self._database, seconds=PLAN_SECONDS)
        self.sessions: sessionmaker[Session] = database.session_factory(self._database)
        self.statements = database.statement_factory(self.sessions)  # for transactions of one statement
        self.notifier = StreamNotifier(settings.redis_url)
        self.owner = owner
        self.lease_seconds = settings.lease_seconds
        self.pause_quantum_seconds = settings.pause_quantum_seconds
        self._spec, self.model = spec, spec.id
        self.passes_messages = spec.passes_messages
        self.remote_resume = None if spec.remote is None else spec.remote.resume
        self.model_revision = model_revision(spec)  # computed from the files, like the one that the API stores in jobs

    def claim(
        self, limit: int, lane: Lane, known: frozenset[UUID], *, num_slots: int, min_suspicions: int, is_repeated: bool
    ) -> list[ClaimedJob]:
        """Claim up to `limit` jobs of a lane for `num_slots` slots, fairest first. `known` are those that run here.
        `tell_claimed` is for later: the engine need not wait for it."""
        if is_repeated:  # in a transaction of its own, since a claim's does not wait for the disk
            self.release_others(known)
        with self.statements() as session:
            return jobs.claim(
                session,
                self._spec.id,
                limit=limit,
                owner=self.owner,
                model_revision=self.model_revision,
                lease_seconds=self.lease_seconds,
                lane=lane,
                min_suspicions=min_suspicions,
                num_slots=num_slots,
            )

    def release_others(self, known: frozenset[UUID]) -> None:
        """Release what earlier calls may have claimed without our hearing of it."""
        with self.sessions.begin() as session:
            database.plan_anew(session)  # a plan for any status has no use for the index of running jobs
            released = self.release_unknown(session, known)
        job_log.returned(AttemptOutcome.RELEASED, released)
        self.notifier.publish((job.job_id, job.status) for job in released)

    def plan_ahead(self) -> None:
        """Call in a quiet moment, before a claim: makes anew the plans that the next job would have to wait for."""
        with self.statements() as session:
            if database.discard_plans(session):
                nothing = ChunkCommit(UUID(int=0), attempt=0, chunks=[TokenChunk(sequence_number=1)])
                jobs.commit_chunks(session, [nothing], lease_seconds=self.lease_seconds, owner=self.owner)

    def tell_claimed(self, claimed: Sequence[ClaimedJob]) -> None:
        self.notifier.publish((job.id, streams.Started(job.attempt, job.last_sequence_number)) for job in claimed)
        job_log.claimed(claimed, self._worker_name)

    def cancel_queued(self, job_ids: Sequence[UUID]) -> None:
        with self.sessions.begin() as session:
            cancelled = jobs.cancel_queued(session, job_ids)
        job_log.ended_without_worker(cancelled)
        self.notifier.publish((job.job_id, job.status) for job in cancelled)

    def release(self, job_ids: Sequence[UUID]) -> None:
        with self.sessions.begin() as session:
            released = jobs.release(session, job_ids, owner=self.owner)
        job_log.returned(AttemptOutcome.RELEASED, released)
        self.notifier.publish((job.job_id, job.status) for job in released)

    def start_over(self, job_ids: Sequence[UUID]) -> None:
        """Release these jobs without their output, which a reset in their streams tells."""
        with self.sessions.begin() as session:
            released = jobs.release(session, job_ids, owner=self.owner)
            restarted = jobs.start_over(session, job_ids)
        job_log.returned(AttemptOutcome.RELEASED, released)
        job_log.restarted(restarted, "its server cannot continue it")
        self.notifier.publish((job.job_id, job.status) for job in released)

    def report_crash(self, weight_by_job_id: dict[UUID, int]) -> list[Returned]:
        with self.sessions.begin() as session:
            returned = jobs.report_crash(session, weight_by_job_id, owner=self.owner)
        job_log.returned(AttemptOutcome.CRASHED, returned)
        self.notifier.publish((job.job_id, job.status) for job in returned)
        return returned

    def request_cancel(self, job_ids: Sequence[UUID]) -> None:
        with self.sessions.begin() as session:
            asked = jobs.request_cancel(session, job_ids)
        job_log.ended_without_worker(job for job in asked if job.status.is_terminal)
        self.notifier.publish((job.job_id, JobStatus.CANCELLED) for job in asked)

    def heartbeat(self, report: WorkerReport) -> tuple[Orders, float, float]:
        """Store the worker's report. Returns its orders, by how much the database's clock is ahead of ours, and how
        long it took."""
        asked_at, began_at = time(), monotonic()
        with self.sessions.begin() as session:
            orders = workers.heartbeat(session, report)
        return orders, skew_seconds(orders.clock, asked_at, time()), monotonic() - began_at

    def fail(self, report: WorkerReport) -> None:
        with self.sessions.begin() as session:
            workers.fail(session, report)

    def longest_wait_seconds(self) -> float | None:
        """How long a job has been waiting for this worker to load the model; None if none has."""
        with self.sessions.begin() as session:
            database.plan_anew(session)
            model, revision = self.model, self.model_revision
            return workers.longest_wait_seconds(session, self.owner, model=model, model_revision=revision)

    def order_drain(self, release_after_seconds: float) -> None:
        with self.sessions.begin() as session:
            workers.drain(session, self._worker_name, release_after_seconds=release_after_seconds)

    def order_resume(self) -> None:
        with self.sessions.begin() as session:
            workers.resume(session, self._worker_name)

    def forget_worker(self) -> None:
        with self.sessions.begin() as session:
            workers.forget(session, self.owner)

    def close(self) -> None:
        self.notifier.close()
        self._database.dispose()

    def release_unknown(self, session: Session, known: frozenset[UUID]) -> list[Returned]:
        """Release jobs that are ours according to SQL but do not run here, because the answer to their claim was
        lost."""
        owned = session.scalars(
            select(Job.id).where(Job.lease_owner == self.owner, Job.status == JobStatus.IN_PROGRESS)
        )
        return jobs.release(session, [job_id for job_id in owned if job_id not in known], owner=self.owner)


COST_SHARE = 0.1  # the share of the storage thread's time that may go into commits in the middle of jobs

COST_SMOOTHING = 0.2  # weight of the latest commit in the moving average


@dataclass(frozen=True, slots=True)
class JobFlush:
    """What one job has to store: chunks, its end, or both; if neither, only its lease is renewed."""

    job: RunningJob
    commit: ChunkCommit | None
    finalisation: Finalisation | None


@dataclass(frozen=True, slots=True)
class FlushOutcome:
    """The result of a commit. A job that appears in neither field was fenced off."""

    held: dict[UUID, Held] = field(default_factory=dict)
    ended: dict[UUID, JobStatus] = field(default_factory=dict)
    cost_seconds: float = 0.0


class FlushPacer:
    """Decides when the jobs of one worker are flushed. At most one regular flush is in progress at a time."""

    def __init__(self, settings: Settings) -> None:
        self._min_seconds = settings.flush_min_seconds
        self._max_seconds = max(settings.flush_max_seconds, settings.flush_min_seconds)
        self._renew_seconds = settings.lease_seconds / 3
        self._cost_seconds = 0.0
        self._flushed_at = 0.0
        self._is_under_way = False

    @property
    def interval_seconds(self) -> float:
        """The interval between two flushes in the middle of a job."""
        return min(max(self._cost_seconds / COST_SHARE, self._min_seconds), self._max_seconds)

    def seconds_until_due(self, running: Iterable[RunningJob], now: float) -> float | None:
        """Seconds until the next regular flush: 0 if one is due now, None if none is pending."""
        if self._is_under_way:
            return None  # a flush is in progress, and its answer will wake the runner
        due = [self._seconds_until_due(job, now) for job in running if not job.is_ending]
        return max(0.0, min(due)) if due else None

    def take_due(self, running: Iterable[RunningJob], now: float) -> list[JobFlush]:
        """The next regular flush; empty if nothing is due. Otherwise the caller must call `finish` when it is done."""
        running = [job for job in running if not job.is_ending]
        if self.seconds_until_due(running, now) != 0.0:
            return []
        # Once half of the interval has passed, include everything that is pending, for fewer and larger commits.
        is_round = now >= self._flushed_at + self.interval_seconds / 2
        if is_round:
            self._flushed_at = now
        flushes = self.take([job for job in running if is_round or self._seconds_until_due(job, now) <= 0], now)
        self._is_under_way = bool(flushes)
        return flushes

    def take(self, running: Iterable[RunningJob], now: float) -> list[JobFlush]:
        """Everything that these jobs have to store, due or not. A job with nothing pending is included only if its
        lease must be renewed."""
        return [flush for job in running if not job.is_ending and (flush := self._take(job, now)) is not None]

    def finish(self, outcome: FlushOutcome | None) -> None:
        """Call when the regular flush is done. `outcome` is None if it failed."""
        self._is_under_way = False
        if outcome is not None:
            self._cost_seconds += COST_SMOOTHING * (outcome.cost_seconds - self._cost_seconds)

    def _seconds_until_due(self, job: RunningJob, now: float) -> float:
        if job.is_urgent:
            return 0.0
        until_renewal = job.leased_at + self._renew_seconds - now
        if not job.has_pending:
            return until_renewal
        return min(self._flushed_at + self.interval_seconds - now, until_renewal)

    def _take(self, job: RunningJob, now: float) -> JobFlush | None:
        chunks = job.take_chunks()
        if not chunks and not job.is_over and now < job.leased_at + self._renew_seconds:
            return None
        job.is_ending = job.is_over
        return JobFlush(
            job=job,
            commit=ChunkCommit(job.id, job.attempt, chunks, job.engine_seconds) if chunks else None,
            finalisation=job.finalisation() if job.is_ending else None,
        )


def commit(storage: JobStorage, flushes: Sequence[JobFlush]) -> FlushOutcome:
    """Commit, then publish. Blocks. It is safe to repeat this with the same flushes if the answer was lost."""
    started_at = monotonic()
    try:
        held, ended = _transact(storage, flushes)
    except OUTAGES:
        raise
    except Exception as exc:
        if len(flushes) > 1:
            return _commit_one_by_one(storage, flushes)
        log.exception("a job's output cannot be stored", extra={"job_id": flushes[0].job.name})
        return _give_up(storage, flushes[0], exc)
    cost_seconds = monotonic() - started_at
    storage.notifier.publish(_events(flushes, held, ended))  # first: somebody waits for it
    _log_progress(flushes, held, ended)
    return FlushOutcome(held, ended, cost_seconds)


def _transact(storage: JobStorage, flushes: Sequence[JobFlush]) -> tuple[dict[UUID, Held], dict[UUID, JobStatus]]:
    commits = [flush.commit for flush in flushes if flush.commit is not None]
    finalisations = [flush.finalisation for flush in flushes if flush.finalisation is not None]
    renewals = [flush.job.id for flush in flushes if flush.commit is None and flush.finalisation is None]
    is_one_statement = not renewals and not finalisations
    with (storage.statements if is_one_statement else storage.sessions).begin() as session:
        held = jobs.commit_chunks(session, commits, lease_seconds=storage.lease_seconds, owner=storage.owner)
        held += jobs.renew(session, renewals, owner=storage.owner, lease_seconds=storage.lease_seconds)
        ours = set(jobs.finalise(session, finalisations, owner=storage.owner))
    ended = {ending.job_id: ending.status for ending in finalisations if ending.job_id in ours}
    return {job.job_id: job for job in held}, ended


def _commit_one_by_one(storage: JobStorage, flushes: Sequence[JobFlush]) -> FlushOutcome:
    """Commit each job on its own, since one whose output cannot be stored must not hold up the others."""
    outcomes = [commit(storage, [flush]) for flush in flushes]
    return FlushOutcome(
        held={job_id: held for outcome in outcomes for job_id, held in outcome.held.items()},
        ended={job_id: status for outcome in outcomes for job_id, status in outcome.ended.items()},
        cost_seconds=sum(outcome.cost_seconds for outcome in outcomes),
    )


def _give_up(storage: JobStorage, flush: JobFlush, exc: Exception) -> FlushOutcome:
    """Fail the job. Whatever was committed before this flush is kept."""
    chunks = flush.commit.chunks if flush.commit is not None else ()
    ending = Finalisation(
        job_id=flush.job.id,
        attempt=flush.job.attempt,
        last_sequence_number=chunks[0].sequence_number - 1 if chunks else flush.job.last_sequence_number,
        status=JobStatus.FAILED,
        result=None,
        error=JobError(code=EngineError.code, message=f"the output could not be stored: {type(exc).__name__}"),
        engine_seconds=flush.job.engine_seconds,
    )
    with storage.sessions.begin() as session:
        ended = dict.fromkeys(jobs.finalise(session, [ending], owner=storage.owner), JobStatus.FAILED)
    _log_progress([JobFlush(flush.job, None, ending)], {}, ended)
    storage.notifier.publish(ended.items())
    return FlushOutcome(ended=ended)


def _log_progress(flushes: Sequence[JobFlush], held: dict[UUID, Held], ended: dict[UUID, JobStatus]) -> None:
    """Log first tokens and ends."""
    for flush in flushes:
        job = flush.job
        seconds = monotonic() - job.started_at
        if flush.commit is not None and job.id in held and is_first_output(job.claimed, flush.commit):
            job_log.first_token(job.claimed, seconds=seconds)
        if flush.finalisation is not None and job.id in ended:
            job_log.ended(job.claimed, flush.finalisation, num_tokens=job.num_completion_tokens, seconds=seconds)


def is_first_output(claimed: ClaimedJob, commit: ChunkCommit) -> bool:
    """Whether the job had no output before, in any attempt."""
    return not claimed.num_committed_tokens and commit.chunks[0].sequence_number == claimed.last_sequence_number + 1


def _events(
    flushes: Sequence[JobFlush], held: dict[UUID, Held], ended: dict[UUID, JobStatus]
) -> Iterator[tuple[UUID, streams.Event]]:
    for flush in flushes:
        job_id = flush.job.id
        if flush.commit is not None and (job_id in held or job_id in ended):
            yield from ((job_id, _news_of(chunk)) for chunk in flush.commit.chunks)
        if job_id in ended:
            yield job_id, ended[job_id]


def _news_of(chunk: TokenChunk) -> streams.Event:
    """The event to publish for a chunk. Prompt logprobs can be megabytes, too much for Redis, so readers are only told
    to read such a chunk from SQL."""
    return chunk if chunk.prompt_logprobs is None else JobStatus.IN_PROGRESS
