"""The runner's side of the job protocol: one method per transaction, each followed by its news for open streams.

Every method blocks and runs on the storage thread. `is_repeated` says that an earlier try of the same call may have
been committed although its answer was lost; the other methods may be repeated without being told.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from time import monotonic
from uuid import UUID

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from sqlalchemy import select
from sqlalchemy.orm import Session, sessionmaker

from domain.catalog import ModelSpec
from domain.jobs import JobStatus, Lane
from settings import Settings
from storage import database, jobs, streams, worker_drains, workers
from storage.jobs import ClaimedJob, Returned
from storage.tables import Job
from storage.workers import Orders, WorkerReport
from tasks import job_log
from tasks.model_files import model_revision

logger = logging.getLogger(__name__)

REDIS_TIMEOUT_SECONDS = 0.2
REDIS_PAUSE_SECONDS = 1.0  # after a failure nothing is published for so long: readers fall back to SQL anyway


class LiveChannel:
    """Publishes what was committed. A Redis that is away costs one short timeout a second, and the streams a second."""

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
    """What one worker does with its jobs in SQL."""

    def __init__(self, settings: Settings, spec: ModelSpec, owner: UUID, worker_name: str) -> None:
        self._worker_name = worker_name
        self._database = database.open_database(
            settings.database_url,
            pool_size=2,  # the bell has the other
            max_overflow=0,
            idle_seconds=settings.idle_transaction_seconds,
        )
        self.sessions: sessionmaker[Session] = database.session_factory(self._database)
        self.channel = LiveChannel(settings.redis_url)
        self.owner = owner
        self.lease_seconds = settings.lease_seconds
        self._spec = spec
        self.model_revision = model_revision(spec)  # as the API wrote it into the job: that of the files, not a name

    def claim(self, job_ids: Sequence[UUID], known: frozenset[UUID], *, is_repeated: bool) -> list[ClaimedJob]:
        """Take the claimable ones among `job_ids`; `known` are the jobs that run here already."""
        return self._claim(
            lambda session: jobs.claim(
                session,
                job_ids,
                owner=self.owner,
                model_revision=self.model_revision,
                lease_seconds=self.lease_seconds,
            ),
            known,
            is_repeated,
        )

    def claim_next(
        self, limit: int, lane: Lane, known: frozenset[UUID], *, min_suspicions: int, is_repeated: bool
    ) -> list[ClaimedJob]:
        """Take the next jobs of a lane without having heard of them."""
        return self._claim(
            lambda session: jobs.claim_next(
                session,
                self._spec.id,
                limit=limit,
                owner=self.owner,
                model_revision=self.model_revision,
                lease_seconds=self.lease_seconds,
                lane=lane,
                min_suspicions=min_suspicions,
            ),
            known,
            is_repeated,
        )

    def release(self, job_ids: Sequence[UUID]) -> None:
        with self.sessions.begin() as session:
            released = jobs.release(session, job_ids, owner=self.owner)
        job_log.returned("released", released)
        self.channel.publish((job.job_id, job.status) for job in released)

    def report_crash(self, weight_by_job_id: dict[UUID, int]) -> list[Returned]:
        with self.sessions.begin() as session:
            returned = jobs.report_crash(session, weight_by_job_id, owner=self.owner)
        job_log.returned("crashed with its engine", returned)
        self.channel.publish((job.job_id, job.status) for job in returned)
        return returned

    def request_cancel(self, job_id: UUID) -> None:
        with self.sessions.begin() as session:
            asked = jobs.request_cancel(session, [job_id])
        job_log.ends(job for job in asked if job.status.is_terminal)
        self.channel.publish((job.job_id, JobStatus.CANCELLED) for job in asked)

    def heartbeat(self, report: WorkerReport) -> Orders:
        """Returns what the worker is to do."""
        with self.sessions.begin() as session:
            return workers.heartbeat(session, report)

    def order_drain(self, release_after_seconds: float) -> None:
        with self.sessions.begin() as session:
            worker_drains.drain(session, self._worker_name, release_after_seconds=release_after_seconds)

    def order_resume(self) -> None:
        with self.sessions.begin() as session:
            worker_drains.resume(session, self._worker_name)

    def forget_worker(self) -> None:
        with self.sessions.begin() as session:
            workers.forget(session, self.owner)

    def close(self) -> None:
        self.channel.close()
        self._database.dispose()

    def _claim(
        self, take: Callable[[Session], list[ClaimedJob]], known: frozenset[UUID], is_repeated: bool
    ) -> list[ClaimedJob]:
        with self.sessions.begin() as session:
            released = self._release_unknown(session, known) if is_repeated else []
            claimed = take(session)
        job_log.returned("released", released)
        job_log.claimed(claimed, self._worker_name)
        self.channel.publish((job.id, JobStatus.IN_PROGRESS) for job in claimed)
        return claimed

    def _release_unknown(self, session: Session, known: frozenset[UUID]) -> list[Returned]:
        """Give back what the lost answer of a claim may have named: jobs that are ours in SQL and that nobody runs."""
        owned = session.scalars(
            select(Job.id).where(Job.lease_owner == self.owner, Job.status == JobStatus.IN_PROGRESS)
        )
        return jobs.release(session, [job_id for job_id in owned if job_id not in known], owner=self.owner)
