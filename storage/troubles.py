"""What can be wrong with PostgreSQL while it answers, which processes have fallen silent, and what others tell.

Only what asks for processes reads tables of ours, so the rest answers while one is locked.
"""

from dataclasses import dataclass

from sqlalchemy import text
from sqlalchemy.orm import Session

from storage.database import MIGRATIONS
from storage.job_statements import CLOCK
from storage.workers import FORGET_SECONDS, LIVE_SECONDS

NEWEST_REVISION = max(path.name[:4] for path in (MIGRATIONS / "versions").glob("[0-9]*.py"))

DISK_FULL, READ_ONLY = "53100", "25006"  # SQLSTATEs

BUSY_CONNECTIONS = 0.9  # of those that PostgreSQL gives us
WAIT_SECONDS = 2.0  # a lock that is waited for longer than this is worth naming
SILENT_SECONDS = 10.0  # a worker reports every two seconds

BOUND = {"silent_seconds": SILENT_SECONDS, "live_seconds": LIVE_SECONDS, "forget_seconds": FORGET_SECONDS}

# `numbackends` is shown to every role, the rows of pg_stat_activity are not.
SERVER = text("""
SELECT extract(epoch FROM clock_timestamp())::float8 AS clock, pg_is_in_recovery() AS is_standby,
    (SELECT sum(numbackends) FROM pg_stat_database)::int AS num_connections,
    current_setting('max_connections')::int AS max_connections,
    current_setting('superuser_reserved_connections')::int AS num_reserved
""")

# Of a chain of waiting sessions, the one at its beginning, which waits for none.
BLOCKERS = text("""
WITH waiting AS MATERIALIZED (
    SELECT pid, pg_blocking_pids(pid) AS blockers,
        extract(epoch FROM clock_timestamp() - query_start)::float8 AS seconds
    FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'
        AND query_start < clock_timestamp() - make_interval(secs => :seconds))
SELECT b.pid, coalesce(b.application_name, '') AS application, count(*)::int AS num_waiting, max(seconds) AS seconds
FROM waiting w CROSS JOIN unnest(w.blockers) AS u(blocker) JOIN pg_stat_activity b ON b.pid = u.blocker
WHERE u.blocker NOT IN (SELECT pid FROM waiting)
GROUP BY b.pid, b.application_name ORDER BY num_waiting DESC, b.pid
""")

# A worker that stops says so. One that is replaced, under its name or another, is missed by nobody.
SILENT = text(f"""
SELECT w.hostname, w.model, extract(epoch FROM {CLOCK} - w.seen_at)::float8 AS seconds FROM workers w
WHERE w.seen_at < {CLOCK} - make_interval(secs => :silent_seconds)
    AND w.seen_at > {CLOCK} - make_interval(secs => :forget_seconds) AND NOT w.troubles ? 'model_failed'
    AND NOT EXISTS (SELECT FROM workers o WHERE o.seen_at > {CLOCK} - make_interval(secs => :live_seconds)
        AND o.started_at > w.seen_at AND (o.hostname = w.hostname OR o.model = w.model))
ORDER BY w.hostname
""")  # noqa: S608  (CLOCK is a constant)

SILENT_PROCESSES = text(f"""
SELECT p.kind, p.name, extract(epoch FROM {CLOCK} - p.seen_at)::float8 AS seconds FROM processes p
WHERE p.seen_at < {CLOCK} - make_interval(secs => :silent_seconds)
    AND p.seen_at > {CLOCK} - make_interval(secs => :forget_seconds)
    AND NOT EXISTS (SELECT FROM processes o WHERE o.seen_at > {CLOCK} - make_interval(secs => :live_seconds)
        AND o.started_at > p.seen_at AND o.kind = p.kind)
ORDER BY p.kind, p.name
""")  # noqa: S608  (CLOCK is a constant)

# What live ones tell; and of workers that could not serve their model, the newest of each model and machine, unless one
# of these has begun to serve it since.
TROUBLED = text(f"""
SELECT 'worker' AS kind, w.hostname AS name, w.model, t.key AS code, t.value AS words
FROM workers w CROSS JOIN jsonb_each_text(w.troubles) t
WHERE w.seen_at > {CLOCK} - make_interval(secs => :live_seconds)
    OR t.key = 'model_failed' AND w.seen_at > {CLOCK} - make_interval(secs => :forget_seconds)
        AND NOT EXISTS (SELECT FROM workers o
            WHERE o.model = w.model AND split_part(o.hostname, '@', 2) = split_part(w.hostname, '@', 2)
            AND (o.troubles ? 'model_failed' AND o.seen_at > w.seen_at
                OR o.state = 'ready' AND o.seen_at > {CLOCK} - make_interval(secs => :live_seconds)
                    AND o.started_at > w.seen_at + make_interval(secs => :live_seconds)))
UNION ALL
SELECT p.kind, p.name, '', t.key, t.value FROM processes p CROSS JOIN jsonb_each_text(p.troubles) t
WHERE p.seen_at > {CLOCK} - make_interval(secs => :live_seconds)
ORDER BY code, name
""")  # noqa: S608  (CLOCK is a constant)

# Emptied at each commit, so that each insert makes its file one page longer, which takes room on the disk.
MAKE_PROBE = text("CREATE TEMPORARY TABLE IF NOT EXISTS celeriac_room (filler text) ON COMMIT DELETE ROWS")
PROBE = text("INSERT INTO celeriac_room VALUES ('x')")


@dataclass(frozen=True, slots=True)
class ServerState:
    clock: float  # seconds since 1970
    is_standby: bool
    num_connections: int
    max_connections: int
    num_reserved: int  # of them, for superusers

    @property
    def is_short_of_connections(self) -> bool:
        return self.num_connections > BUSY_CONNECTIONS * (self.max_connections - self.num_reserved)


@dataclass(frozen=True, slots=True)
class Blocker:
    """A session of PostgreSQL that holds a lock for which others have been waiting, the longest of them `seconds`."""

    pid: int
    application: str
    num_waiting: int
    seconds: float


@dataclass(frozen=True, slots=True)
class SilentWorker:
    """It has not reported for `seconds`, did not say that it stops, and nothing has taken its place."""

    hostname: str
    model: str
    seconds: float


@dataclass(frozen=True, slots=True)
class SilentProcess:
    """An API or a maintenance process, likewise."""

    kind: str
    name: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Told:
    """What a process tells of itself. `code` may be one that only another release knows."""

    kind: str
    name: str
    model: str  # of a worker
    code: str
    words: str  # for operators


def server_state(session: Session) -> ServerState:
    return ServerState(**session.execute(SERVER).one()._asdict())


def blockers(session: Session) -> list[Blocker]:
    """The sessions for whose locks others have been waiting for WAIT_SECONDS; the one that stops most comes first."""
    return [Blocker(**row._asdict()) for row in session.execute(BLOCKERS, {"seconds": WAIT_SECONDS})]


def schema_revisions(session: Session) -> tuple[str | None, str]:
    """The revision of the schema, and the one that this release needs; they sort by age."""
    found: str | None = session.scalar(text("SELECT version_num FROM alembic_version"))
    return found, NEWEST_REVISION


def silent_workers(session: Session) -> list[SilentWorker]:
    return [SilentWorker(**row._asdict()) for row in session.execute(SILENT, BOUND)]


def silent_processes(session: Session) -> list[SilentProcess]:
    return [SilentProcess(**row._asdict()) for row in session.execute(SILENT_PROCESSES, BOUND)]


def told_troubles(session: Session) -> list[Told]:
    bound = {name: BOUND[name] for name in ("live_seconds", "forget_seconds")}
    return [Told(**row._asdict()) for row in session.execute(TROUBLED, bound)]


def try_to_write(session: Session) -> None:
    """Write where nobody sees it. Raises what PostgreSQL raises when its disk is full (53100)."""
    session.execute(MAKE_PROBE)
    session.execute(PROBE)
