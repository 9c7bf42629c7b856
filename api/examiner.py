"""Why not all is well: the dependencies of this process, looked at every two seconds, each trouble with its remedy.

It has a connection of its own, since those of requests are all in use when a table is locked. /health shows the reasons
and /metrics counts them, so neither waits for the other to notice. Anyone may read them: they hold no address and no
path.
"""

import asyncio
import logging
import os
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence, Set
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, TypeVar
from uuid import UUID, uuid4

from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session

import observability
from api.reasons import (
    FATAL,
    NO_JOBS,
    Reason,
    ReasonCode,
    silent_process_reasons,
    silent_worker_reasons,
    told_reasons,
)
from api.redis_examiner import RedisExaminer
from domain.clocks import MAX_SKEW_SECONDS, skew_seconds
from domain.troubles import Trouble
from metrics import health_reasons
from observability import describe_exception
from settings import Settings
from storage import certificates, processes, troubles
from storage.database import async_session_factory, open_statement_database, repeatable, within
from storage.processes import ProcessKind, ProcessReport
from storage.session_settings import set_for_connections
from storage.troubles import DISK_FULL, READ_ONLY, ServerState

log = logging.getLogger(__name__)

T = TypeVar("T")

EXAMINE_SECONDS = 2.0  # between two looks
CHECK_SECONDS = 2.0  # how long the database may take to answer

# The examiner's own statements. Those that are abandoned after CHECK_SECONDS end then, or the next look would find no
# connection; and what is written here need not survive a crash.
IMPATIENT = {
    "statement_timeout": f"{CHECK_SECONDS:g}s",
    "lock_timeout": "500ms",
    "synchronous_commit": "off",
}
WRITE_SECONDS = 5.0  # between two tries to write
CERTIFICATE_SECONDS = 600.0  # between two looks at the certificates of servers
BLOCKED_SECONDS = 10.0  # for which a lock is named after it was last waited for: those that give up come back
SETTLED_SECONDS = 10.0  # after an outage, until those that could not report count as silent
SLOW_SECONDS, NUM_SLOW = 0.5, 3  # answers in a row, each of them slower than this


#: What PostgreSQL or the system says when a connection is refused, and what that means. It has no codes for clients.
REFUSALS = (
    ("too many clients", ReasonCode.DATABASE_CONNECTIONS, "raise its max_connections, or run fewer processes"),
    ("connection slots", ReasonCode.DATABASE_CONNECTIONS, "raise its max_connections, or run fewer processes"),
    ("No space left", ReasonCode.DATABASE_FULL, "make room on its disk"),
    ("refused", ReasonCode.DATABASE_UNAVAILABLE, "nothing listens there, start PostgreSQL or see its log"),
    (
        "closed the connection unexpectedly",
        ReasonCode.DATABASE_UNAVAILABLE,
        "it ended, start PostgreSQL or see its log",
    ),
    ("SSL connection has been closed", ReasonCode.DATABASE_UNAVAILABLE, "it ended or is cut off, see its log"),
    ("SSL SYSCALL", ReasonCode.DATABASE_UNAVAILABLE, "it ended or is cut off, see its log"),
    ("No such file", ReasonCode.DATABASE_UNAVAILABLE, "nothing listens there, start PostgreSQL or see its log"),
    ("starting up", ReasonCode.DATABASE_UNAVAILABLE, "it is starting, wait or see its log"),
    ("recovery", ReasonCode.DATABASE_UNAVAILABLE, "it recovers from a crash, wait or see its log"),
    ("shutting down", ReasonCode.DATABASE_UNAVAILABLE, "it is stopping, start it again"),
    ("no password supplied", ReasonCode.DATABASE_UNAVAILABLE, "it refuses our user, see CELERIAC_DATABASE_URL"),
    ("authentication failed", ReasonCode.DATABASE_UNAVAILABLE, "it refuses our user, see CELERIAC_DATABASE_URL"),
    ("pg_hba.conf", ReasonCode.DATABASE_UNAVAILABLE, "it refuses our user or our address, see its pg_hba.conf"),
    ("not permitted to log in", ReasonCode.DATABASE_UNAVAILABLE, "it refuses our user, see CELERIAC_DATABASE_URL"),
    ('role "', ReasonCode.DATABASE_UNAVAILABLE, "it has no such user, see CELERIAC_DATABASE_URL"),
    ('database "', ReasonCode.DATABASE_UNAVAILABLE, "it has no such database, see CELERIAC_DATABASE_URL"),
    ("certificate", ReasonCode.DATABASE_UNAVAILABLE, "TLS fails, see its certificate and CELERIAC_DATABASE_URL"),
    ("SSL", ReasonCode.DATABASE_UNAVAILABLE, "TLS fails, see its certificate and CELERIAC_DATABASE_URL"),
    ("resolve host", ReasonCode.DATABASE_UNAVAILABLE, "its name is not known, see CELERIAC_DATABASE_URL"),
    ("translate host name", ReasonCode.DATABASE_UNAVAILABLE, "its name is not known, see CELERIAC_DATABASE_URL"),
    ("No route to host", ReasonCode.DATABASE_UNAVAILABLE, "no network leads there, see CELERIAC_DATABASE_URL"),
)


@dataclass(slots=True)
class Findings:
    """What the last look saw, and what needs no look."""

    reasons: list[Reason]

    def has(self, codes: frozenset[ReasonCode]) -> bool:
        return any(reason.code in codes for reason in self.reasons)


class Examiner:
    """`others` are the reasons that need no look, such as what the queue monitor knows. See `open_examiner`."""

    def __init__(
        self,
        sessions: async_sessionmaker[AsyncSession],
        of_redis: RedisExaminer,
        others: Callable[[Sequence[Reason]], Iterator[Reason]],
        report: ProcessReport,
    ) -> None:
        self._report = report
        self._sessions = sessions
        self._redis = of_redis
        self._others = others
        self._looking = asyncio.Lock()
        self._seen: list[Reason] = []
        self._seen_at = float("-inf")  # monotonic: when the last look began
        self._written_at = float("-inf")  # monotonic
        self._write_reason: Reason | None = None
        self._blocker: Reason | None = None
        self._blocked_at = float("-inf")  # monotonic
        self._certificates_due_at = 0.0  # monotonic
        self._expiring: list[Reason] = []
        self._was_away_at = time.monotonic()
        self._settled_reasons: list[Reason] = []  # of the schema and of what is neglected

    async def look(self, *, max_age_seconds: float) -> Findings:
        """What is wrong, looked at again if that is older than this. Never raises for what it finds."""
        asked_at = time.monotonic()
        async with self._looking:  # those that waited for the lock find what was begun since they asked
            if asked_at - self._seen_at > max_age_seconds:
                began_at = time.monotonic()
                of_database, of_redis = await asyncio.gather(self._database_reasons(), self._redis.reasons())
                of_others = await self._process_reasons({reason.code for reason in (*of_database, *of_redis)})
                self._seen, self._seen_at = [*of_database, *of_redis, *of_others], began_at
                self._publish()
        return self._findings

    @property
    def _findings(self) -> Findings:
        return Findings([*self._seen, *self._others(self._seen)])

    async def look_forever(self) -> None:
        while True:
            try:
                await self.look(max_age_seconds=EXAMINE_SECONDS / 2)
            except Exception:  # an outermost loop: the next look may succeed
                log.exception("could not examine the dependencies")
            await asyncio.sleep(EXAMINE_SECONDS)

    def _publish(self) -> None:
        found = {reason.code for reason in self._findings.reasons}
        for code in ReasonCode:
            health_reasons.labels(code.value).set(code in found)

    # PostgreSQL

    async def _database_reasons(self) -> list[Reason]:
        try:
            return await self._reasons_by_database()
        except (SQLAlchemyError, OSError) as exc:
            return [self._away(exc)]

    def _away(self, exc: BaseException) -> Reason:
        self._was_away_at = time.monotonic()
        return refusal(exc)

    async def _reasons_by_database(self) -> list[Reason]:
        """Raises SQLAlchemyError or OSError if it is away."""
        asked_at, began_at = time.time(), time.monotonic()
        state = await self._ask(troubles.server_state)
        reasons = list(_state_reasons(state, asked_at, time.time()))
        reasons += await self._slowness_reasons(time.monotonic() - began_at)
        if state.is_standby:
            return reasons
        reasons += await self._lock_reasons()
        reasons += await self._write_reasons()
        reasons += await self._certificate_reasons()
        return reasons

    async def _slowness_reasons(self, seconds: float) -> list[Reason]:
        """Of a query that reads no table. One that took long is asked again."""
        fastest = seconds
        for _ in range(NUM_SLOW - 1):
            if fastest < SLOW_SECONDS:
                return []
            began_at = time.monotonic()
            await self._answer(_nothing)
            fastest = min(fastest, time.monotonic() - began_at)
        if fastest < SLOW_SECONDS:
            return []
        seen = f"PostgreSQL takes {fastest:.1f} s for the simplest query"
        remedy = "see the load of its machine and the network to it"
        return [Reason(ReasonCode.DATABASE_SLOW, f"{seen}: {remedy}")]

    async def _lock_reasons(self) -> list[Reason]:
        found = await self._answer(troubles.blockers)
        if found:
            first = found[0]
            sentence = (
                f"{first.num_waiting} sessions of PostgreSQL have waited up to {first.seconds:.0f} s for a lock of its "
                f"process {first.pid}, which celeriac doctor names: end it, such as with "
                f"SELECT pg_terminate_backend({first.pid})"
            )
            self._blocker, self._blocked_at = Reason(ReasonCode.DATABASE_LOCKED, sentence), time.monotonic()
        if self._blocker is None or time.monotonic() - self._blocked_at > BLOCKED_SECONDS:
            return []
        return [self._blocker]

    async def _write_reasons(self) -> list[Reason]:
        if time.monotonic() - self._written_at > WRITE_SECONDS:
            self._written_at = time.monotonic()
            self._write_reason = None
            try:
                await self._ask(troubles.try_to_write)
            except (SQLAlchemyError, OSError) as exc:
                self._write_reason = _write_refusal(exc)
            self._settled_reasons = [*await self._answer(_schema_reasons), *await self._answer(_neglect_reasons)]
        return [*([self._write_reason] if self._write_reason else []), *self._settled_reasons]

    async def _certificate_reasons(self) -> list[Reason]:
        if time.monotonic() > self._certificates_due_at:
            self._certificates_due_at = time.monotonic() + CERTIFICATE_SECONDS
            servers = [*await self._answer(_postgres_server), *self._redis.servers]
            told = [await asyncio.to_thread(server.expires_soon) for server in servers]
            self._expiring = [
                Reason(ReasonCode.CERTIFICATE, f"{seen}: {certificates.RENEW}") for seen in told if seen is not None
            ]
        return self._expiring

    # Processes

    async def _process_reasons(self, codes: Set[ReasonCode]) -> list[Reason]:
        """Also reports that this one runs."""
        if codes & (FATAL | {ReasonCode.DATABASE_SCHEMA}):
            return []
        try:
            return await self._reasons_by_processes(codes)
        except (SQLAlchemyError, OSError) as exc:
            return [self._away(exc)]

    async def _reasons_by_processes(self, codes: Set[ReasonCode]) -> list[Reason]:
        lost = observability.lost_lines()
        own = {} if lost is None else {Trouble.LOG.value: f"its log takes no lines: {lost}"}
        await self._answer(_beat, self._report, own)
        reasons = list(told_reasons(await self._answer(troubles.told_troubles), codes))
        if time.monotonic() - self._was_away_at > SETTLED_SECONDS:
            reasons += silent_worker_reasons(await self._answer(troubles.silent_workers))
            reasons += silent_process_reasons(await self._answer(troubles.silent_processes))
        return reasons

    async def leave(self) -> None:
        """It stops, and is not to be missed."""
        with suppress(SQLAlchemyError, OSError):
            await self._ask(_forget, self._report.id)

    async def _answer(self, function: Callable[..., list[T]], *args: Any) -> list[T]:
        """Nothing, if the database does not answer this, such as for a lock or for want of a right. Raises
        SQLAlchemyError or OSError if it does not answer the simplest query either: then it has begun to hang, or went
        away, during the look, which would take seconds for each of its questions."""
        try:
            return await self._ask(function, *args)
        except (SQLAlchemyError, OSError) as exc:
            log.debug("could not examine the database", extra={"reason": describe_exception(exc)})
        await self._ask(_nothing)
        return []

    def _ask(self, function: Callable[..., T], *args: Any) -> Awaitable[T]:
        return within(CHECK_SECONDS, repeatable(self._sessions, function, *args))


def _nothing(session: Session) -> list[None]:
    session.execute(text("SELECT 1"))
    return []


def _beat(session: Session, report: ProcessReport, own: dict[str, str]) -> list[None]:
    processes.beat(session, report, own)
    return []


def _forget(session: Session, process_id: UUID) -> list[None]:
    processes.forget(session, process_id)
    return []


def _schema_reasons(session: Session) -> list[Reason]:
    found, needed = troubles.schema_revisions(session)
    if found is not None and found < needed:
        seen = f"the schema of the database is {found}, and this release needs {needed}"
        return [Reason(ReasonCode.DATABASE_SCHEMA, f"{seen}: run celeriac migrate")]
    return []


def _postgres_server(session: Session) -> list[certificates.VerifiedServer]:
    server = certificates.postgres_server(session.connection())
    return [] if server is None else [server]


def _neglect_reasons(session: Session) -> list[Reason]:
    return [Reason(ReasonCode.DATABASE_NEGLECTED, one.public) for one in troubles.neglects(session)]


def refusal(exc: BaseException) -> Reason:
    """Why the database cannot be asked."""
    said = str(getattr(exc, "orig", None) or exc)
    for words, code, remedy in REFUSALS:
        if words in said:
            what = "PostgreSQL gives no connection"
            return Reason(code, f"{what}: {remedy}" + (f"; {NO_JOBS}" if code in FATAL else ""))
    what = f"the database does not answer within {CHECK_SECONDS:g} s"
    return Reason(
        ReasonCode.DATABASE_UNAVAILABLE,
        f"{what}: it hangs or is cut off, see its log and CELERIAC_DATABASE_URL; {NO_JOBS}",
    )


def _write_refusal(exc: BaseException) -> Reason | None:
    state = getattr(getattr(exc, "orig", None), "sqlstate", None)
    if state == DISK_FULL:
        return Reason(ReasonCode.DATABASE_FULL, f"PostgreSQL's disk is full: make room on it; {NO_JOBS} until then")
    if state == READ_ONLY:
        return Reason(ReasonCode.DATABASE_READ_ONLY, f"PostgreSQL takes no writes: name its primary; {NO_JOBS}")
    log.debug("could not try to write", extra={"reason": describe_exception(exc)})  # such as for want of a right
    return None


def _state_reasons(state: ServerState, asked_at: float, answered_at: float) -> Iterator[Reason]:
    if state.is_standby:
        remedy = "list all servers in CELERIAC_DATABASE_URL, with target_session_attrs=read-write"
        yield Reason(ReasonCode.DATABASE_READ_ONLY, f"PostgreSQL is a standby: {remedy}; {NO_JOBS}")
    if state.is_short_of_connections:
        seen = f"{state.num_connections} of {state.max_connections} connections of PostgreSQL are in use"
        remedy = "raise its max_connections, or run fewer processes"
        yield Reason(ReasonCode.DATABASE_CONNECTIONS, f"{seen}: {remedy}")
    skew = skew_seconds(state.clock, asked_at, answered_at)
    if abs(skew) > MAX_SKEW_SECONDS:
        direction = "behind" if skew > 0 else "ahead of"
        seen = f"this API's clock is {abs(skew):.1f} s {direction} the database's"
        yield Reason(ReasonCode.CLOCK, f"{seen}: run NTP on both machines")


@asynccontextmanager
async def open_examiner(
    settings: Settings, others: Callable[[Sequence[Reason]], Iterator[Reason]]
) -> AsyncIterator[Examiner]:
    """Looks until it is closed."""
    database = open_statement_database(settings.database_url, pool_size=1, max_overflow=1)
    set_for_connections(database.sync_engine, IMPATIENT)
    name = f"api {os.getpid()} on {socket.gethostname()}"
    report = ProcessReport(uuid4(), ProcessKind.API, name, version("celeriac"))
    of_redis = RedisExaminer(settings.redis_url)
    examiner = Examiner(async_session_factory(database), of_redis, others, report)
    looking: asyncio.Task[Any] = asyncio.create_task(examiner.look_forever())
    try:
        yield examiner
    finally:
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)
        await examiner.leave()
        await of_redis.close()
        await database.dispose()
