"""Checks of PostgreSQL, and of what it knows: the schema, clocks, workers and maintenance."""

import time
from collections.abc import Iterable, Iterator
from datetime import datetime
from importlib.metadata import version

from sqlalchemy import Connection, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from celeriac.examination.results import CheckResult, clock_result, fail, ok, warn
from domain.jobs import WorkerState
from domain.troubles import WORDS, Trouble
from settings import Settings
from storage import certificates, job_queues, maintenance, processes, row_security, troubles, workers
from storage.database import CONNECT_ARGS, MIGRATIONS, SharedSessions, database_url, refuse_shared_sessions
from storage.session_settings import keeps_sessions, make_database, set_for_connections
from storage.tables import Worker

MIN_POSTGRES = 14
STATEMENT_SECONDS = 10


def database_results(settings: Settings) -> Iterator[CheckResult]:
    """All checks that need the database; they end with the first one without which the others make no sense."""
    url = database_url(settings.database_url)
    begun_at = time.monotonic()
    try:
        refuse_shared_sessions(url)
    except SharedSessions as exc:
        yield fail(
            "pooler", str(exc), "append ?pool_mode=transaction to the URL, or set pool_mode = session in the pooler"
        )
        return
    except SQLAlchemyError as exc:
        seen = _first_line(exc)
        if "too many clients" in seen or "connection slots" in seen:
            yield fail(
                "connections", f"none is left: {seen}", "raise max_connections of PostgreSQL, or run fewer processes"
            )
            return
        remedy = "start it with celeriac up, or name a server in CELERIAC_DATABASE_URL"
        yield fail("database", f"it does not answer: {seen}", remedy)
        return
    database = make_database(
        url, poolclass=NullPool, isolation_level="AUTOCOMMIT", connect_args=CONNECT_ARGS
    )  # a statement that fails does not harm the next one
    set_for_connections(database, {"statement_timeout": f"{STATEMENT_SECONDS}s"})
    try:
        with database.connect() as connection:
            yield from _server_results(connection, time.monotonic() - begun_at)
            with Session(connection) as session:
                yield from _trouble_results(session)
            schema = schema_result(connection)
            yield schema
            if schema.level != "fail":
                if settings.auth != "none":  # else there is only one tenant
                    yield _row_security_result(connection)
                with Session(connection) as session:
                    yield from _maintenance_results(session, settings)
                    yield from _worker_results(session, settings)
    except SQLAlchemyError as exc:
        yield fail("database", f"a query failed: {_first_line(exc)}", "see PostgreSQL's log")
    finally:
        database.dispose()


def _server_results(connection: Connection, seconds: float) -> Iterator[CheckResult]:
    def shown(name: str) -> str:
        return str(connection.scalar(text(f"SHOW {name}")))

    release = int(shown("server_version_num")) // 10_000
    has_tls = connection.scalar(text("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()"))
    sessions = (
        "with sessions of our own" if keeps_sessions(connection.engine) else "behind a pooler in transaction mode"
    )
    seen = f"PostgreSQL {release}, {'with' if has_tls else 'without'} TLS, {sessions} ({seconds:.1f} s)"
    if release < MIN_POSTGRES:
        yield fail("database", seen, f"upgrade it to PostgreSQL {MIN_POSTGRES} or newer")
    elif connection.scalar(text("SELECT pg_is_in_recovery()")):
        remedy = "list all servers in CELERIAC_DATABASE_URL, with target_session_attrs=read-write"
        yield fail("database", f"{seen}, but a standby, which takes no writes", remedy)
    elif shown("server_encoding") != "UTF8":
        yield fail("database", f"{seen}, encoded as {shown('server_encoding')}", "create it with ENCODING 'UTF8'")
    elif shown("fsync") != "on" or shown("synchronous_commit") == "off":
        yield warn("database", f"{seen}; a crash may lose accepted jobs", "set fsync = on and synchronous_commit = on")
    else:
        yield ok("database", seen)
    server = certificates.postgres_server(connection)
    if server is not None and (expires := server.expires_soon()) is not None:
        yield warn("certificates", expires, certificates.RENEW)
    asked_at = time.time()
    server_time = float(connection.scalar(text("SELECT extract(epoch FROM clock_timestamp())")) or 0)
    yield clock_result("clock of the database", server_time, asked_at, time.time(), "run NTP on both machines")


def _trouble_results(session: Session) -> Iterator[CheckResult]:
    """What may be wrong while it answers. Before all that reads tables, which may be locked."""
    state = troubles.server_state(session)
    seen = f"{state.num_connections} of {state.max_connections} connections are in use"
    if state.is_short_of_connections:
        yield warn("connections", seen, "raise max_connections of PostgreSQL, or run fewer processes")
    else:
        yield ok("connections", seen)
    for blocker in troubles.blockers(session):
        named = f" ({blocker.application})" if blocker.application else ""
        seen = f"{blocker.num_waiting} sessions wait for a lock of process {blocker.pid}{named} of PostgreSQL"
        yield fail("locks", seen, f"end what it does, or SELECT pg_terminate_backend({blocker.pid})")
    if not state.is_standby:
        yield _write_result(session)
        for neglect in troubles.neglects(session):
            yield warn("upkeep", neglect.seen, neglect.remedy)


def _write_result(session: Session) -> CheckResult:
    """Into a temporary table, which nobody sees."""
    try:
        troubles.try_to_write(session)
    except SQLAlchemyError as exc:
        session.rollback()
        state = getattr(getattr(exc, "orig", None), "sqlstate", None)
        if state == troubles.DISK_FULL:
            return fail("disk of the database", "it is full", "make room on it; no job can be accepted until then")
        if state == troubles.READ_ONLY:
            remedy = "name its primary, or see its default_transaction_read_only; no job can be accepted until then"
            return fail("disk of the database", "it takes no writes", remedy)
        return warn(
            "disk of the database", f"could not try to write: {_first_line(exc)}", "GRANT TEMPORARY to our role"
        )
    return ok("disk of the database", "it takes what is written")


def _row_security_result(connection: Connection) -> CheckResult:
    reason = connection.scalar(text(row_security.GAP))
    if reason is not None:
        return warn("row-level security", f"it is not in force: {reason}", row_security.REMEDY)
    return ok("row-level security", "it is in force: a request sees only rows of its own tenant")


def schema_result(connection: Connection) -> CheckResult:
    """Whether the schema is that of this release."""
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    scripts = ScriptDirectory.from_config(config)
    head = scripts.get_current_head()
    found = None
    if connection.scalar(text("SELECT to_regclass('alembic_version')")) is not None:
        found = connection.scalar(text("SELECT version_num FROM alembic_version"))
    if found is None:
        return fail("schema", "there is none in this database", "celeriac migrate")
    if found == head:
        return ok("schema", f"it is that of this release ({head})")
    if found in {script.revision for script in scripts.walk_revisions()}:
        return fail("schema", f"it is at {found}, and this release needs {head}", "celeriac migrate")
    remedy = "upgrade this installation; only the last release before that schema runs on it"
    return warn("schema", f"{found} is newer than this release, which knows {head}", remedy)


def _maintenance_results(session: Session, settings: Settings) -> Iterator[CheckResult]:
    ages = maintenance.seconds_since_ticks(session)
    late = {clock: age for clock, age in ages.items() if age > settings.maintenance_silence_seconds}
    if not ages:
        yield fail("maintenance", "it has never run: lost jobs are not rescued", "start it: celeriac maintenance")
    elif late:
        named = ", ".join(f"{clock} for {age:.0f} s" for clock, age in sorted(late.items()))
        yield fail("maintenance", f"it is silent: {named}", "start it, or restart it: celeriac maintenance")
    else:
        yield ok("maintenance", f"its clocks tick: {', '.join(sorted(ages))}")


def _worker_results(session: Session, settings: Settings) -> Iterator[CheckResult]:
    """Per model that has jobs, workers, or is the default one."""
    live = workers.list_live(session)
    drained, unloaded = {drain.hostname for drain in workers.list_drains(session)}, workers.unloaded_models(session)
    num_queued = {model: figures.num_queued for model, figures in job_queues.queue_figures(session).items()}
    default = settings.default_model
    yield from _process_results(session)
    if not live:
        yield fail("workers", "no worker is alive", "start one: celeriac worker")
    models = {worker.model for worker in live} | {model for model, num in num_queued.items() if num}
    for model in sorted(models | ({default} if default and live else set())):
        own = [worker for worker in live if worker.model == model]
        if live or num_queued.get(model):
            yield worker_result(model, own, num_queued.get(model, 0), drained, is_unloaded=model in unloaded)


def _process_results(session: Session) -> Iterator[CheckResult]:
    """Those that fell silent, and what others find wrong with themselves."""
    remedy = "it was killed, is frozen or cut off: restart it, or see its log"
    for worker in troubles.silent_workers(session):
        seen = f"{worker.hostname} ({worker.model}) has been silent for {worker.seconds:.0f} s"
        yield warn("workers", seen, remedy)
    for process in troubles.silent_processes(session):
        yield warn("processes", f"{process.name} has been silent for {process.seconds:.0f} s", remedy)
    yield from _release_results(session)
    for told in troubles.told_troubles(session):
        if told.code in set(Trouble):
            of = f" ({told.model})" if told.model else ""
            yield warn(
                "workers" if told.model else "processes", f"{told.name}{of}: {told.words}", WORDS[Trouble(told.code)][1]
            )


def _release_results(session: Session) -> Iterator[CheckResult]:
    """Those that were not started again after an upgrade, or were upgraded before this installation."""
    running: list[tuple[str, str, str | None, datetime]] = [
        ("workers", f"{worker.hostname} ({worker.model})", worker.release, worker.started_at)
        for worker in workers.list_live(session)
    ]
    running += [("processes", one.name, one.release, one.started_at) for one in processes.list_live(session)]
    own = version("celeriac")
    for name, who, release, started_at in running:
        if release != own:
            since = f"since {started_at:%Y-%m-%d %H:%M} UTC"
            seen = f"{who} has run {release or 'an older release'} {since}, and this is {own}"
            yield warn(name, seen, "restart it, so that all run the same; an upgrade may leave both for a while")


def worker_result(
    model: str, live: Iterable[Worker], num_queued: int, drained: set[str], *, is_unloaded: bool
) -> CheckResult:
    """The workers of one model."""
    states = [("drained" if worker.hostname in drained else str(worker.state)) for worker in live]
    num_ready = states.count(WorkerState.READY)
    waiting = f"; {num_queued} jobs wait" if num_queued else ""
    counted = ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states))) or "none is alive"
    seen = f"{model}: {counted}{waiting}"
    if num_ready and "drained" not in states:
        return ok("workers", seen)
    if is_unloaded:
        return warn("workers", f"{seen}; it is unloaded", f"load it: POST /v1/admin/models/{model}/load")
    if "drained" in states:
        return warn("workers", seen, "resume it: POST /v1/admin/workers/{hostname}/resume")
    if states:
        return warn("workers", seen, "wait until the model is loaded; celeriac workers shows how far it has come")
    return fail("workers", seen, f"start one: celeriac worker --model {model}")


def _first_line(exc: SQLAlchemyError) -> str:
    return str(getattr(exc, "orig", None) or exc).strip().splitlines()[0]
