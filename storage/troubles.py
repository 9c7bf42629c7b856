"""What can be wrong with PostgreSQL while it answers, and which workers have fallen silent.

Only `silent_workers` reads a table of ours, so the others answer while one is locked.
"""

from dataclasses import dataclass

from sqlalchemy import text
from sqlalchemy.orm import Session

from storage.job_statements import CLOCK
from storage.workers import FORGET_SECONDS, LIVE_SECONDS

DISK_FULL, READ_ONLY = "53100", "25006"  # SQLSTATEs

BUSY_CONNECTIONS = 0.9  # of those that PostgreSQL gives us
WAIT_SECONDS = 2.0  # a lock that is waited for longer than this is worth naming
SILENT_SECONDS = 10.0  # a worker reports every two seconds

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
    AND w.seen_at > {CLOCK} - make_interval(secs => :forget_seconds)
    AND NOT EXISTS (SELECT FROM workers o WHERE o.seen_at > {CLOCK} - make_interval(secs => :live_seconds)
        AND o.started_at > w.seen_at AND (o.hostname = w.hostname OR o.model = w.model))
ORDER BY w.hostname
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


def server_state(session: Session) -> ServerState:
    return ServerState(**session.execute(SERVER).one()._asdict())


def blockers(session: Session) -> list[Blocker]:
    """The sessions for whose locks others have been waiting for WAIT_SECONDS; the one that stops most comes first."""
    return [Blocker(**row._asdict()) for row in session.execute(BLOCKERS, {"seconds": WAIT_SECONDS})]


def silent_workers(session: Session) -> list[SilentWorker]:
    bound = {"silent_seconds": SILENT_SECONDS, "live_seconds": LIVE_SECONDS, "forget_seconds": FORGET_SECONDS}
    return [SilentWorker(**row._asdict()) for row in session.execute(SILENT, bound)]


def try_to_write(session: Session) -> None:
    """Write where nobody sees it. Raises what PostgreSQL raises when its disk is full (53100)."""
    session.execute(MAKE_PROBE)
    session.execute(PROBE)
