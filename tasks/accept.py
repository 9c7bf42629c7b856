"""Group commit of submissions: all that arrive during one commit go into the next one.

A group is one statement and one COMMIT, so a hundred jobs cost little more than one. A job is accepted once that COMMIT
has returned. Workers are told of it then, before its client: they have the longer way to go.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import chain
from uuid import UUID

from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session

from domain.errors import StorageUnavailable
from domain.shares import SharedQueue
from metrics import jobs_accept_group_size, jobs_accept_seconds, jobs_accept_waiting
from observability import describe_exception
from settings import Settings
from storage import answers, job_accept
from storage.answered_jobs import accept_answered
from storage.database import OUTAGES, async_session_factory, keep_plans, open_statement_database
from storage.job_accept import MAX_POISON_JOBS_PER_HOUR, Accepted, AcceptOutcome, CannotSendTogether, NewJob

log = logging.getLogger(__name__)

MAX_GROUP = 256
MAX_GROUP_TOKENS = 1_000_000  # of prompts: a group is one document, of which PostgreSQL and we have copies in memory
MAX_WAITING = 8_192  # submissions, in turns of their tenants
NUM_FLUSHERS = 2  # one prepares while the other waits for the disk
NUM_RETRIES = 2  # of a group whose COMMIT may or may not have happened
ANSWER_SECONDS = 5.0  # the longest that a submission waits for the database
PLAN_SECONDS = 3.0  # for which plans are kept: longer than the next two together
AHEAD_SECONDS = 2.0  # after which plans are made anew in a quiet moment
QUIET_SECONDS = 0.25  # without a job: such a moment
STALLED_SECONDS = 2.0  # if all flushers have waited this long, submissions are refused at once

_UNREACHABLE = (*OUTAGES, OSError)


@dataclass(slots=True)
class _Waiting:
    new_job: NewJob
    answer: asyncio.Future[Accepted]
    since: float  # monotonic
    accepted: Accepted | None = None  # what is committed, and will be the answer whatever happens next


@dataclass(frozen=True, slots=True)
class _Flush:
    group: list[_Waiting]
    since: float  # monotonic


class GroupAcceptor:
    """Accepts jobs in groups. Bound to one event loop; to be used between `start` and `stop`."""

    def __init__(
        self,
        sessions: async_sessionmaker[AsyncSession],
        *,
        max_queued_jobs: int,
        max_poison_jobs_per_hour: int = MAX_POISON_JOBS_PER_HOUR,
        answer_seconds: float = 86_400.0,
        ring: Callable[[str, UUID], None] = lambda model, job_id: None,
    ) -> None:
        """`answer_seconds`: how old the answers of the response cache may be. `ring(model id, job id)` is called right
        after the commit; it must return at once and never raise."""
        self._sessions = sessions
        self._bounds = {"max_queued_jobs": max_queued_jobs, "max_poison_jobs_per_hour": max_poison_jobs_per_hour}
        self._answer_seconds = answer_seconds
        self._ring = ring
        self._waiting: SharedQueue[_Waiting] = SharedQueue(MAX_WAITING)
        self._wakeup = asyncio.Event()
        self._gathering = asyncio.Lock()
        self._under_way: dict[int, _Flush] = {}  # by flusher
        self._flushed_at = 0.0  # monotonic: when the last flush began
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self._tasks = [asyncio.create_task(self._flush_forever(number)) for number in range(NUM_FLUSHERS)]
        self._tasks += [asyncio.create_task(self._refuse_overdue()), asyncio.create_task(self._plan_ahead())]

    async def stop(self) -> None:
        """Waiting submissions are refused with StorageUnavailable, so that clients retry with another server."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        while len(self._waiting):
            _refuse(self._waiting.pop()[1], StorageUnavailable("this server is shutting down; retry in a moment"))

    async def accept(self, new_job: NewJob) -> Accepted:
        """Returns after the group's COMMIT. Raises ServerOverloaded or StorageUnavailable; at once if the cause is
        known."""
        self._refuse_hopeless()
        waiting = _Waiting(new_job, asyncio.get_running_loop().create_future(), time.monotonic())
        self._waiting.append(new_job.tenant_id, waiting, what="submissions are waiting to be accepted")
        self._wakeup.set()
        return await waiting.answer

    def _refuse_hopeless(self) -> None:
        stalled_since = time.monotonic() - STALLED_SECONDS
        flushes = self._under_way.values()
        if len(flushes) == NUM_FLUSHERS and all(flush.since < stalled_since for flush in flushes):
            raise StorageUnavailable("the database does not answer; retry in a moment", retry_after_seconds=5)

    async def _refuse_overdue(self) -> None:
        """Refuse submissions that a hanging database keeps waiting. One periodic check costs less than a timer for
        each."""
        while True:
            await asyncio.sleep(ANSWER_SECONDS / 10)
            too_old = time.monotonic() - ANSWER_SECONDS
            under_way = (waiting for flush in self._under_way.values() for waiting in flush.group)
            for waiting in chain(self._waiting, under_way):
                if waiting.since < too_old:
                    _refuse(waiting, _unconfirmed())

    async def _plan_ahead(self) -> None:
        """When no job comes for a moment, make anew the plan that the next one might have to wait for."""
        planned_at = float("-inf")
        while True:
            await asyncio.sleep(QUIET_SECONDS)
            now = time.monotonic()
            if now - planned_at < AHEAD_SECONDS or now - self._flushed_at < QUIET_SECONDS:
                continue
            planned_at = now
            try:
                async with self._sessions() as session:
                    await session.run_sync(job_accept.plan_ahead, **self._bounds)
            except Exception as exc:  # an outermost loop; the next job will tell, if it is still so
                log.debug("no plans could be made", extra={"reason": describe_exception(exc)})

    async def _flush_forever(self, number: int) -> None:
        while True:
            await self._wakeup.wait()
            async with self._gathering:
                await self._gather()
                group = self._take_group()
            if not group:
                self._wakeup.clear()
                continue
            self._flushed_at = time.monotonic()
            self._under_way[number] = _Flush(group, self._flushed_at)
            try:
                await self._flush(group)
            except Exception as exc:  # an outermost loop: one bad group must not stop accepting
                log.exception("accepting a group of jobs failed", extra={"num_jobs": len(group)})
                _refuse_all(group, exc)
            except asyncio.CancelledError:  # by `stop`
                _refuse_all(group, _unconfirmed())
                raise
            finally:
                del self._under_way[number]

    async def _gather(self) -> None:
        """Returns once a turn of the event loop brings no more submissions, or a group is full. An idle loop has such
        a turn at once; a busy one would else send a group for every few submissions that it has read, and each group's
        statements and commit take as long as several submissions."""
        num_before = 0
        while num_before < len(self._waiting) < MAX_GROUP:
            num_before = len(self._waiting)
            await asyncio.sleep(0)

    def _take_group(self) -> list[_Waiting]:
        """The next group, without clients that hung up before their job was sent."""
        group: list[_Waiting] = []
        num_tokens = 0
        while len(self._waiting) and len(group) < MAX_GROUP and num_tokens < MAX_GROUP_TOKENS:
            _, waiting = self._waiting.pop()
            if not waiting.answer.done():
                group.append(waiting)
                num_tokens += len(waiting.new_job.prompt_token_ids)
        jobs_accept_waiting.set(len(self._waiting))
        return group

    async def _flush(self, group: list[_Waiting]) -> None:
        try:
            outcomes = await self._accept_surely([waiting.new_job for waiting in group])
        except _UNREACHABLE as exc:
            log.warning("submissions refused: the database is unavailable", extra={"reason": describe_exception(exc)})
            _refuse_all(group, _unconfirmed())
        except (DBAPIError, CannotSendTogether):
            await self._flush_halves(group)
        else:
            for waiting, outcome in zip(group, outcomes, strict=True):
                waiting.accepted = outcome
            await self._ring_for(group)
            for waiting, outcome in zip(group, outcomes, strict=True):
                if not waiting.answer.done():
                    waiting.answer.set_result(outcome)

    async def _ring_for(self, group: list[_Waiting]) -> None:
        """Returns when the message is on its way: the event loop writes at the end of a turn, and in the same one would
        make the answers first."""
        queued = [waiting.new_job for waiting in group if waiting.accepted and waiting.accepted.is_queued]
        for new_job in queued:
            self._ring(new_job.request.model_id, new_job.id)
        if queued:
            await asyncio.sleep(0)

    async def _flush_halves(self, group: list[_Waiting]) -> None:
        """Isolate a job that SQL refuses, or that is too long for others, by bisection: it does not fail its group."""
        if len(group) == 1:
            log.exception("a job was refused by the database", extra={"model": group[0].new_job.request.model})
            _refuse(group[0], RuntimeError("the database refused a validated job"))
            return
        middle = len(group) // 2
        await self._flush(group[:middle])
        await self._flush(group[middle:])

    async def _accept_surely(self, new_jobs: list[NewJob]) -> list[Accepted]:
        """Accept, and retry if the connection breaks. The ids are the same, so jobs that were committed are found, not
        duplicated. Retried more than once, as the first error may be that of a connection lost while idle."""
        for _ in range(NUM_RETRIES):
            with contextlib.suppress(*OUTAGES):
                return await self._accept(new_jobs)
        return await self._accept(new_jobs)

    async def _accept(self, new_jobs: list[NewJob]) -> list[Accepted]:
        started = time.perf_counter()
        try:
            outcomes = await self._answer_what_can_be_read(new_jobs)
        except _NotAnswered as exc:
            log.warning("jobs run although their answers may be known", extra={"reason": describe_exception(exc.cause)})
            outcomes = await self._transact(new_jobs, self._accept_in)
        jobs_accept_seconds.observe(time.perf_counter() - started)
        jobs_accept_group_size.observe(len(new_jobs))
        return [_as_first_time(job.id, outcome) for job, outcome in zip(new_jobs, outcomes, strict=True)]

    async def _answer_what_can_be_read(self, new_jobs: list[NewJob]) -> list[Accepted]:
        """Answers that cannot be read are forgotten, and the group, all of which they have undone, is accepted anew."""
        try:
            return await self._transact(new_jobs, self._accept_and_answer)
        except answers.UnreadableAnswers as exc:
            log.warning("answers that cannot be read are forgotten", extra={"num_jobs": len(exc.leader_ids)})
            with _told_apart():
                async with self._sessions() as session:
                    await session.run_sync(answers.forget, exc.leader_ids)
                    await session.commit()
        try:
            return await self._transact(new_jobs, self._accept_and_answer)
        except answers.UnreadableAnswers as exc:  # others, of this moment
            raise _NotAnswered(exc) from exc

    async def _transact(
        self, new_jobs: list[NewJob], function: Callable[[Session, Sequence[NewJob]], list[Accepted]]
    ) -> list[Accepted]:
        session = self._sessions()
        try:
            return await session.run_sync(_commit, new_jobs, function)
        except BaseException:
            await asyncio.shield(session.close())
            raise

    def _accept_in(self, session: Session, new_jobs: Sequence[NewJob]) -> list[Accepted]:
        return job_accept.accept(session, new_jobs, answer=job_accept.nobody, **self._bounds)

    def _accept_and_answer(self, session: Session, new_jobs: Sequence[NewJob]) -> list[Accepted]:
        """Insert the jobs, those whose answers are known as completed. Raises _NotAnswered if that fails, or
        UnreadableAnswers."""
        accepted = job_accept.accept(session, new_jobs, answer=self._answer_first, **self._bounds)
        keyed = [
            job
            for job, outcome in zip(new_jobs, accepted, strict=True)
            if job.answer_key is not None and outcome.outcome is AcceptOutcome.ACCEPTED and outcome.record is None
        ]
        if not keyed:
            return accepted
        with _told_apart():
            records = answers.answer(session, keyed, max_age_seconds=self._answer_seconds)
        return [replace(one, record=one.record or records.get(one.job_id)) for one in accepted]

    def _answer_first(self, session: Session, new_jobs: Sequence[NewJob]) -> dict[UUID, Accepted]:
        with _told_apart():
            return accept_answered(session, new_jobs, max_age_seconds=self._answer_seconds, **self._bounds)


def _commit(
    session: Session, new_jobs: list[NewJob], function: Callable[[Session, Sequence[NewJob]], list[Accepted]]
) -> list[Accepted]:
    """Accept, commit and close: in one call, as each that an AsyncSession makes takes turns of the event loop."""
    if any(job.is_limited or job.answer_key is not None for job in new_jobs):
        session.connection(execution_options={"isolation_level": "READ COMMITTED"})  # a transaction
    outcomes = function(session, new_jobs)
    session.commit()
    session.close()
    return outcomes


class _NotAnswered(Exception):
    """Known answers could not be given, so the group is accepted again, to be run."""

    def __init__(self, cause: DBAPIError | answers.UnreadableAnswers) -> None:
        super().__init__()
        self.cause = cause


@contextmanager
def _told_apart() -> Iterator[None]:
    """Raises _NotAnswered if the database refuses to answer, though not if it is away."""
    try:
        yield
    except DBAPIError as exc:
        if exc.connection_invalidated:
            raise
        raise _NotAnswered(exc) from exc


@asynccontextmanager
async def open_acceptor(settings: Settings, *, ring: Callable[[str, UUID], None]) -> AsyncIterator[GroupAcceptor]:
    """An acceptor with its own connections. `ring` as in GroupAcceptor."""
    database = open_statement_database(settings.database_url, pool_size=NUM_FLUSHERS, max_overflow=0)
    keep_plans(database.sync_engine, seconds=PLAN_SECONDS)
    acceptor = GroupAcceptor(
        async_session_factory(database),
        max_queued_jobs=settings.max_queued_jobs,
        max_poison_jobs_per_hour=settings.max_poison_jobs_per_hour,
        answer_seconds=settings.response_cache_seconds,
        ring=ring,
    )
    acceptor.start()
    try:
        yield acceptor
    finally:
        await acceptor.stop()
        await database.dispose()


def _as_first_time(job_id: UUID, accepted: Accepted) -> Accepted:
    """A job that is a duplicate of itself was accepted by an earlier try, whose answer was lost."""
    if accepted.outcome is AcceptOutcome.DUPLICATE and accepted.job_id == job_id:
        return Accepted(job_id, AcceptOutcome.ACCEPTED, datetime.now(UTC))
    return accepted


def _unconfirmed() -> StorageUnavailable:
    return StorageUnavailable(
        "the database did not confirm whether the job was accepted; "
        "retry with the same Idempotency-Key to have it accepted exactly once",
        retry_after_seconds=2,
    )


def _refuse_all(group: list[_Waiting], exc: Exception) -> None:
    for waiting in group:
        _refuse(waiting, exc)


def _refuse(waiting: _Waiting, exc: Exception) -> None:
    """What was accepted, but is not answered yet, is not refused: its client might send it again, as another job."""
    if waiting.answer.done():
        return
    if waiting.accepted is None:
        waiting.answer.set_exception(exc)
    else:
        waiting.answer.set_result(waiting.accepted)
