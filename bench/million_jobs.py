"""Compares each operation on a full database with the same on an empty one: `python -m bench.million_jobs`.

Full are a million queued jobs of a thousand tenants, ten thousand running ones, and a million ended ones of one more
tenant, with their records in the ledger. Both databases are on one embedded PostgreSQL with fsync on, whose role is a
plain one, so row-level security is in force. Operations run by turns on both. Prints what each took and the ratio, with
`--explain` the plans of those with a ratio over 2, then one JSON line. `--jobs 100000` is a tenth of all but those that
run; with `--tenants 1` all queued jobs are of one tenant; with `--unanalysed` PostgreSQL knows nothing of the full
tables.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg
from sqlalchemy import Engine, event, text
from sqlalchemy.orm import Session

from bench.storage import new_job
from domain.eta import FairOrder, TenantQueue
from domain.jobs import JobStatus, first_id
from local.servers import EmbeddedPostgres
from storage import (
    answers,
    batch_lines,
    job_accept,
    job_queries,
    job_queues,
    jobs,
    limits,
    maintenance,
    paces,
    running_sums,
    tenant_queues,
    usage,
    usage_hours,
    webhook_deliveries,
)
from storage.database import keep_plans, migrate, open_database, session_factory
from storage.row_security import SETTING
from storage.usage import UsageQuery

MODEL = "bench"
NUM_TENANTS = 1_000
BATCH = 50_000

PREPARE = """
INSERT INTO tenants (id, name) SELECT md5('tenant ' || n)::uuid, 'tenant-' || n FROM generate_series(0, :num_tenants) n;
INSERT INTO tenant_load (tenant_id, virtual_time) SELECT id, 1000 * random() FROM tenants ON CONFLICT DO NOTHING;
"""

#: Jobs `first` to `last` of all; ids ascend, as those of real jobs do.
FILL = """
WITH made AS (
    SELECT n, (lpad(to_hex((extract(epoch FROM now()) * 1000)::bigint - 86400000 + n), 12, '0')
        || lpad(to_hex(n % 65536), 4, '0') || substr(md5(n::text), 1, 16))::uuid AS id,
        CASE WHEN :status IN ('completed', 'failed') THEN md5('tenant 0')::uuid
            ELSE md5('tenant ' || n % {num_tenants} + 1)::uuid END AS tenant_id,
        now() - make_interval(secs => 86400 - n / 1000.0) AS at
    FROM generate_series(CAST(:first AS int), :last) n
),
stored AS (
    INSERT INTO jobs (id, tenant_id, model, model_revision, request_hash, status, max_failures, num_prompt_tokens,
        max_tokens, seed, cost, metadata, result_ttl_seconds, created_at, available_at, idempotency_key, attempt,
        lease_owner, lease_expires_at, started_at, attempt_started_at, progressed_at, finished_at, prune_at, eta)
    SELECT id, tenant_id, '{model}', 'main', sha256(id::text::bytea), :status, 3, 48, 64, 1, 112,
        json_build_object('run', 'run-' || n % 5000), 86400, at, at, 'key-' || :status || n,
        CASE WHEN :status = 'queued' THEN 0 ELSE 1 END,
        CASE WHEN :status = 'in_progress' THEN md5('worker ' || n % 100)::uuid END,
        CASE WHEN :status = 'in_progress' THEN now() + interval '1 day' END,
        CASE WHEN :status <> 'queued' THEN at END, CASE WHEN :status <> 'queued' THEN at END,
        CASE WHEN :status <> 'queued' THEN now() END,
        CASE WHEN :status IN ('completed', 'failed') THEN at END,
        CASE WHEN :status IN ('completed', 'failed') THEN at + interval '30 days' END, ARRAY[1, 2, 1, 2]
    FROM made RETURNING id, tenant_id, finished_at
),
entries AS (  -- as the triggers of jobs make them, which are off
    INSERT INTO metadata_entries (tenant_id, entry, job_id)
    SELECT tenant_id, md5('3:runrun-' || n % 5000)::uuid, id FROM made
),
payloads AS (
    INSERT INTO job_payloads (job_id, request, prompt_token_ids)
    SELECT id, CAST(:request AS json), array_fill(17, ARRAY[48]) FROM stored
)
INSERT INTO usage_records (tenant_id, ended_at, job_id, attempt, outcome, is_attempt, is_end, key_id, model, kind,
    is_batch, num_prompt_tokens, num_cached_tokens, num_output_tokens, num_reasoning_tokens, queue_seconds,
    prefill_seconds, decode_seconds, engine_seconds, num_allowed_tokens, eta_start_seconds, eta_end_seconds)
SELECT tenant_id, now() - interval '1 day' + 40 * (finished_at - (now() - interval '1 day')), id, 1, :status, true,
    true, 'key', '{model}', 'generation', false, 48, 0, 60, 0, 1, 0.1,
    2, 1, 64, 1, 3 FROM stored WHERE finished_at IS NOT NULL
"""

COUNT = """
UPDATE tenant_load l SET num_queued = c.queued, num_running = c.running, num_queued_tokens = c.tokens FROM (
    SELECT tenant_id, count(*) FILTER (WHERE status = 'queued') AS queued,
        count(*) FILTER (WHERE status = 'in_progress') AS running,
        coalesce(sum(cost) FILTER (WHERE status = 'queued'), 0) AS tokens
    FROM jobs WHERE status IN ('queued', 'in_progress') GROUP BY tenant_id) c
WHERE c.tenant_id = l.tenant_id
"""


REOPEN = """
UPDATE usage_closing SET (closed_from, closed_until) = (
    SELECT date_trunc('hour', now()) - interval '25 hours', date_trunc('hour', now()) - interval '25 hours')
"""


@dataclass
class Place:
    """A database, and what the operations need to know of it."""

    database: Engine  # sees all tenants, as the janitor and the workers do
    walled: Engine  # sees one tenant in each transaction, as the API does
    accepting: Engine
    tenant_id: UUID
    ended_tenant_id: UUID
    statements: list[tuple[str, Any]] = field(default_factory=list)  # that the last operation executed
    accepted: list[UUID] = field(default_factory=list)
    running: list[UUID] = field(default_factory=list)
    is_full: bool = False
    corrected_at: float = float("-inf")

    @contextmanager
    def session(self, *, of: UUID | None = None, accepting: bool = False) -> Iterator[Session]:
        database = self.accepting if accepting else self.database if of is None else self.walled
        with session_factory(database).begin() as session:
            if of is not None:
                session.execute(text(f"SELECT set_config('{SETTING}', '{of}', true)"))
                self.statements.clear()
            yield session


def open_place(url: str, *, is_full: bool) -> Place:
    database, walled, accepting = open_database(url), open_database(url), open_database(url)
    keep_plans(accepting)
    with database.connect() as connection:
        tenant_id, ended = connection.execute(text("SELECT md5('tenant 1')::uuid, md5('tenant 0')::uuid")).one()
    place = Place(database, walled, accepting, tenant_id, ended, is_full=is_full)

    @event.listens_for(walled, "before_cursor_execute")
    @event.listens_for(database, "before_cursor_execute")
    def note(connection: object, cursor: object, statement: str, parameters: Any, *rest: object) -> None:
        place.statements.append((statement, parameters))

    return place


def fill(url: str, num_jobs: int, num_running: int, num_tenants: int = NUM_TENANTS) -> None:
    """As a superuser and without triggers: policies and foreign keys would take most of the time."""
    database = open_database(url)
    wanted = [("completed", num_jobs * 99 // 100), ("failed", num_jobs // 100), ("queued", num_jobs)]
    first, request = 0, new_job().request.model_dump_json()
    for status, count in [*wanted, ("in_progress", num_running)]:
        began_at = time.monotonic()
        for start in range(first, first + count, BATCH):
            statement = text(FILL.format(model=MODEL, num_tenants=num_tenants))
            with database.begin() as connection:
                connection.execute(text("SET LOCAL statement_timeout = 0"))
                connection.execute(text("SET LOCAL session_replication_role = replica"))
                last = min(start + BATCH, first + count) - 1
                connection.execute(statement, {"status": status, "first": start, "last": last, "request": request})
        first += count
        print(f"  {count:9,} {status}, {time.monotonic() - began_at:.0f} s", flush=True)
    with database.begin() as connection:
        connection.execute(text(COUNT))
        connection.execute(text(REOPEN))
    with session_factory(database).begin() as session:
        while usage_hours.close_next(session, datetime.now(UTC) - timedelta(minutes=5)):
            pass
    with database.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("SET statement_timeout = 0"))
        connection.execute(text("VACUUM ANALYZE"))
    database.dispose()


FORGET = """
DELETE FROM pg_statistic WHERE starelid IN (SELECT oid FROM pg_class WHERE relnamespace = 'public'::regnamespace);
UPDATE pg_class SET reltuples = -1, relpages = 0, relallvisible = 0 WHERE relnamespace = 'public'::regnamespace
"""


def forget_statistics(url: str) -> None:
    """As if neither autovacuum nor ANALYZE had seen the tables yet; autovacuum stays away from then on."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("SET allow_system_table_mods = on")
        connection.execute(FORGET)


Operation = Callable[[Place], object]


def accept(num_jobs: int) -> Operation:
    def run(place: Place) -> object:
        new = [new_job(tenant_id=place.tenant_id) for _ in range(num_jobs)]
        with place.session(accepting=True) as session:
            accepted = job_accept.accept(session, new, max_queued_jobs=10**9)
        place.accepted += [one.job_id for one in accepted if one.outcome is job_accept.AcceptOutcome.ACCEPTED]
        return len(accepted)

    return run


def claim(num_jobs: int) -> Operation:
    def run(place: Place) -> object:
        with place.session() as session:
            claimed = jobs.claim(
                session, MODEL, limit=num_jobs, owner=OWNER, model_revision="main", lease_seconds=86_400
            )
        place.running += [job.id for job in claimed]
        assert len(claimed) == num_jobs, (place.is_full, num_jobs, len(claimed), place.accepted[:3])
        return len(claimed)

    return run


OWNER = uuid4()


def position(place: Place) -> object:
    """As QueueMonitor asks: ranked in a short queue, counted in a long one."""
    with place.session() as session:
        look = paces.own_ahead if place.is_full else job_queues.positions
        return look(session, place.accepted[-1:])


def figures(place: Place) -> object:
    """As QueueMonitor reads them in the background."""
    with place.session() as session:
        found = job_queues.queue_figures(session)
        standings = paces.standings_of(paces.standing_rows(session))
        paces.read(session, [MODEL])
    loads = found[MODEL].loads if MODEL in found else {}
    return FairOrder(
        TenantQueue(id, one.virtual_time, one.weight, one.num_running, loads[id])
        for id, one in standings.items()
        if id in loads
    )


def of_tenant(function: Callable[..., object], *arguments: Any, of_ended: bool = False, **options: Any) -> Operation:
    """A read of the API: as the tenant, whose id is its first argument."""

    def run(place: Place) -> object:
        tenant_id = place.ended_tenant_id if of_ended else place.tenant_id
        with place.session(of=tenant_id) as session:
            return function(session, tenant_id, *arguments, **options)

    return run


def of_system(function: Callable[..., object], *arguments: Any, **options: Any) -> Operation:
    def run(place: Place) -> object:
        with place.session() as session:
            return function(session, *arguments, **options)

    return run


def lists(*, of_ended: bool) -> Iterator[tuple[str, Operation]]:
    name = "1,000,000 ended" if of_ended else "1,000 queued"
    now = datetime.now(UTC)
    filters: dict[str, dict[str, Any]] = {
        "": {},
        " by status": {"status": JobStatus.COMPLETED if of_ended else JobStatus.QUEUED},
        " by status, none": {"status": JobStatus.CANCELLED},
        " by model, none": {"model": "another"},
        " by time": {"created_after": now - timedelta(hours=1)},
        " by time, oldest first": {"created_after": now - timedelta(seconds=1), "order": "asc"},
        " by metadata": {"metadata": {"run": "run-7"}},
        " by metadata, none": {"metadata": {"run": "another"}},
        " by key": {"idempotency_key": "key-queued7"},
        " by batch, none": {"batch": "batch_01ARZ3NDEKTSV4RRFFQ69G5FAV"},
        " from the middle": {"after": first_id(time.time() - 86_400 + 500)},
    }
    for title, options in filters.items():
        yield f"list of {name}{title}", of_tenant(job_queries.list_jobs, of_ended=of_ended, limit=21, **options)


def cancel_last(place: Place) -> object:
    with place.session(of=place.tenant_id) as session:
        return jobs.cancel(session, place.accepted.pop(), place.tenant_id)


def cancel_many(place: Place) -> object:
    ids, place.accepted = place.accepted[-32:], place.accepted[:-32]
    with place.session() as session:
        return jobs.request_cancel(session, ids)


def release_all(place: Place) -> object:
    ids, place.running = place.running, []
    with place.session() as session:
        return jobs.release(session, ids, owner=OWNER)


def operations() -> list[tuple[str, Operation]]:
    now = datetime.now(UTC)
    today = UsageQuery(now - timedelta(days=1), now + timedelta(days=1), by_tenant=True)
    patience = {"patience_seconds": 60, "live_seconds": 15}
    return [
        ("accept 1", accept(1)),
        ("accept 64", accept(64)),
        ("position and ETA", position),
        ("claim 1", claim(1)),
        ("claim 16", claim(16)),
        ("release 17", release_all),
        ("cancel", cancel_last),
        ("cancel 32", cancel_many),
        *lists(of_ended=False),
        *lists(of_ended=True),
        (
            "failed jobs of 1,000,000 ended",
            of_tenant(job_queries.list_dead_letters, of_ended=True, after=None, limit=21),
        ),
        ("figures of all queues", figures),
        ("queues by tenant", of_system(tenant_queues.tenant_queues, limit=100)),
        ("recent jobs", of_system(maintenance.recent_jobs)),
        ("what could be claimed", of_system(jobs.claimable_soon, MODEL, model_revisions=["main"], limit=64)),
        ("let batch lines in", of_system(jobs.let_lines_in, MODEL, limit=8)),
        ("batch lines outstanding", of_system(batch_lines.num_outstanding, MODEL)),
        ("rescue", of_system(jobs.rescue, as_of=now, grace_seconds=2, quiet_seconds=0)),
        ("release stalled", of_system(jobs.release_stalled, as_of=now, stall_seconds=86_400)),
        ("expire", of_system(jobs.expire)),
        ("prune, nothing due", of_system(jobs.prune)),
        ("end followers", of_system(answers.end_followers)),
        ("revisions that are gone", of_system(jobs.gone_revisions, live_seconds=15)),
        ("correct sums of what runs", of_system(running_sums.correct)),
        ("count drift", of_system(maintenance.reconcile_load)),
        ("count queued tokens", of_system(limits.count_queued_tokens)),
        ("count orphans", of_system(maintenance.count_orphans)),
        ("count unserved", of_system(maintenance.unserved_jobs, **patience)),
        ("webhook backlog", of_system(webhook_deliveries.backlog)),
        ("usage of a day", of_system(usage.totals, today)),
        ("prune usage, nothing due", of_system(usage.prune, days=400)),
    ]


def measure(places: Sequence[Place], repeats: int) -> dict[str, tuple[float, float]]:
    """The medians of the milliseconds in each place. By turns, so that what else the machine does meets both."""
    took: dict[str, tuple[list[float], list[float]]] = {}
    for number in range(repeats + 1):  # the first one only fills caches
        for name, operation in operations():
            for place, milliseconds in zip(places, took.setdefault(name, ([], [])), strict=True):
                correct_as_maintenance(place)
                place.statements.clear()
                began_at = time.perf_counter()
                operation(place)
                if number:
                    milliseconds.append(1000 * (time.perf_counter() - began_at))
    return {name: (statistics.median(empty), statistics.median(full)) for name, (empty, full) in took.items()}


def correct_as_maintenance(place: Place) -> None:
    """Once a second, where much is running."""
    if not place.is_full or time.monotonic() < place.corrected_at + 1:
        return
    with place.session() as session:
        running_sums.correct(session)
    place.corrected_at = time.monotonic()


def explain(place: Place, operation: Operation) -> None:
    """The plans of the operation's statements; what they change is rolled back."""
    place.statements.clear()
    operation(place)
    for statement, parameters in list(place.statements):
        if not statement.lstrip().startswith(("SELECT", "WITH", "UPDATE", "DELETE")) or "set_config" in statement[:20]:
            continue
        with place.database.connect() as connection:
            plan = connection.exec_driver_sql(f"EXPLAIN (ANALYZE, BUFFERS, COSTS) {statement}", parameters)
            print("\n".join("      " + row[0] for row in plan), flush=True)
            connection.rollback()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=1_000_000)
    parser.add_argument("--running", type=int, default=10_000, help="jobs that run")
    parser.add_argument("--tenants", type=int, default=NUM_TENANTS, choices=range(1, NUM_TENANTS + 1), metavar="N")
    parser.add_argument("--unanalysed", action="store_true")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--explain", action="store_true")
    given = parser.parse_args()
    settings = {"max_wal_size": "8GB", "shared_buffers": "1GB"} | ({"autovacuum": "off"} if given.unanalysed else {})
    with (
        tempfile.TemporaryDirectory(prefix="celeriac-bench-") as folder,
        EmbeddedPostgres(Path(folder), settings=settings) as server,
    ):
        places = []
        with psycopg.connect(server.url_of("postgres"), autocommit=True) as administrator:
            administrator.execute("CREATE ROLE plain LOGIN")
            for name in ("is_empty", "is_full"):
                administrator.execute(f"CREATE DATABASE {name} OWNER plain")
        for name in ("is_empty", "is_full"):
            url = server.url_of(name).replace("postgres@", "plain@", 1)
            migrate(url)
            place = open_place(url, is_full=name == "is_full")
            with place.database.begin() as connection:
                for statement in PREPARE.strip().split("\n"):
                    connection.execute(text(statement), {"num_tenants": NUM_TENANTS} if ":num" in statement else {})
            places.append(place)
        fill(server.url_of("is_full"), given.jobs, given.running, given.tenants)
        if given.unanalysed:
            forget_statistics(server.url_of("is_full"))
        took = measure(places, given.repeats)
        ratios = {name: round(full / empty, 2) for name, (empty, full) in took.items()}
        for name, (empty, full) in took.items():
            print(f"  {name:45} {empty:9.2f} ms empty {full:9.2f} ms full   x {ratios[name]}", flush=True)
        if given.explain:
            for name, operation in operations():
                if ratios[name] > 2:
                    print(f"\n  {name}:")
                    explain(places[1], operation)
        for place in places:
            for database in (place.database, place.walled, place.accepting):
                database.dispose()
    over = {name: ratio for name, ratio in ratios.items() if ratio > 2}
    print(
        json.dumps(
            {
                "bench": "million_jobs",
                "cpus": os.cpu_count(),
                "jobs": given.jobs,
                "tenants": given.tenants,
                "over_2": over,
            }
        )
    )


if __name__ == "__main__":
    main()
