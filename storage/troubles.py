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
OPEN_SECONDS = 3600.0  # a transaction that has been open for longer is one that somebody forgot
KEPT_BYTES = 2.0**30  # of the log, for a replica that is away
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

# What fills the disk and slows queries down, days later. Another user's transactions have no begin for those who may
# not see it. A backup of a large database takes hours, and nobody should end it.
OPEN_TRANSACTION = text("""
SELECT pid, coalesce(application_name, '') AS application,
    extract(epoch FROM clock_timestamp() - xact_start)::float8 AS seconds
FROM pg_stat_activity WHERE datname = current_database() AND backend_type = 'client backend'
    AND pid <> pg_backend_pid() AND coalesce(application_name, '') <> 'pg_dump'
    AND xact_start < clock_timestamp() - make_interval(secs => :seconds)
ORDER BY xact_start LIMIT 1
""")
KEPT_LOG = text("""
SELECT slot_name, pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn)::float8 AS bytes FROM pg_replication_slots
WHERE NOT active AND pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn) > :bytes ORDER BY bytes DESC LIMIT 1
""")
UNVACUUMED = text("""
SELECT c.relname FROM pg_class c WHERE c.relnamespace = current_schema()::regnamespace AND c.relkind = 'r'
    AND EXISTS (SELECT FROM pg_options_to_table(c.reloptions) o
        WHERE o.option_name = 'autovacuum_enabled' AND NOT o.option_value::boolean)
ORDER BY c.relname
""")

# Emptied at each commit, so that each insert makes its file one page longer, which takes room on the disk. One
# statement, since a pooler may run the next one in another session, which has no such table.
PROBE = text("""
DO $$ BEGIN
    CREATE TEMPORARY TABLE IF NOT EXISTS celeriac_room (filler text) ON COMMIT DELETE ROWS;
    INSERT INTO celeriac_room VALUES ('x');
END $$
""")


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
class Neglect:
    """What does no harm today. What anybody may read, the names of others' programs and replicas are not in."""

    seen: str
    remedy: str
    public: str  # both


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


def neglects(session: Session, *, open_seconds: float = OPEN_SECONDS, kept_bytes: float = KEPT_BYTES) -> list[Neglect]:
    """What keeps PostgreSQL from clearing up. Not for a standby."""
    found = []
    if "off" in session.execute(text("SELECT current_setting('autovacuum'), current_setting('track_counts')")).one():
        remedy = "set autovacuum = on and track_counts = on, or its tables grow without end"
        found.append(_unnamed("PostgreSQL vacuums nothing by itself", remedy))
    if tables := session.scalars(UNVACUUMED).all():
        remedy = "ALTER TABLE … RESET (autovacuum_enabled), or they grow without end"
        found.append(_unnamed(f"PostgreSQL does not vacuum {', '.join(tables)} by itself", remedy))
    if (row := session.execute(OPEN_TRANSACTION, {"seconds": open_seconds}).one_or_none()) is not None:
        whose = f"{row.pid} ({row.application})" if row.application else str(row.pid)
        length = f"has been open for {row.seconds / 60:.0f} minutes"
        remedy = f"end it, such as with SELECT pg_terminate_backend({row.pid}), or no table can be vacuumed"
        public = f"a transaction of PostgreSQL {length}: end it, or no table can be vacuumed; celeriac doctor names it"
        found.append(Neglect(f"a transaction of PostgreSQL's process {whose} {length}", remedy, public))
    if (row := session.execute(KEPT_LOG, {"bytes": kept_bytes}).one_or_none()) is not None:
        size = f"{row.bytes / 2**30:.1f} GiB of its log"
        seen = f"PostgreSQL keeps {size} for the slot {row.slot_name}, whose replica is away"
        remedy = f"start that, or SELECT pg_drop_replication_slot('{row.slot_name}'), before its disk is full"
        public = (
            f"PostgreSQL keeps {size} for a replica that is away: start that, or drop its slot, before its disk is full"
        )
        found.append(Neglect(seen, remedy, f"{public}; celeriac doctor names it"))
    return found


def _unnamed(seen: str, remedy: str) -> Neglect:
    return Neglect(seen, remedy, f"{seen}: {remedy}")


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
    session.execute(PROBE)
