"""Measures pruning over a million chunks and more: `python -m bench.storage_years [--jobs 25000] [--rounds 3]`.

In each round as many jobs are stored, with their chunks, as in the one before, and then the janitor's own rule deletes
those of the round before, while another client updates a job of its own. Prints per round how long that took, how long
the other client waited, and the tables' sizes when autovacuum has nothing left to do; then one JSON line.
"""

import argparse
import json
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import redis
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session, sessionmaker

from domain.catalog import Catalog
from local.servers import EmbeddedPostgres
from maintenance import janitor
from maintenance.janitor import Janitor
from settings import Settings
from storage.database import migrate, open_database, session_factory
from storage.tables import DEFAULT_TENANT_ID

CHUNKS_PER_JOB = 40
TABLES = ("jobs", "job_payloads", "job_chunks", "job_results")
BATCH = 5_000

#: Completed jobs as they are after a stream of CHUNKS_PER_JOB flushes. Ids ascend, as those of real jobs do.
INSERT = """
WITH ids AS (
    SELECT (lpad(to_hex((extract(epoch FROM clock_timestamp()) * 1000)::bigint), 12, '0')
        || lpad(to_hex(n), 4, '0') || substr(md5(random()::text), 1, 16))::uuid AS id
    FROM generate_series(1, :num_jobs) n
),
stored AS (
    INSERT INTO jobs (id, tenant_id, model, model_revision, request_hash, status, max_failures, num_prompt_tokens,
        max_tokens, seed, cost, metadata, result_ttl_seconds, finished_at, prune_at, committed_sequence_number, attempt)
    SELECT id, :tenant_id, 'bench', 'main', sha256(id::text::bytea), 'completed', 3, 48, 160, 1, 208, '{}', 60, now(),
        'infinity', :num_chunks, 1 FROM ids RETURNING id
),
payloads AS (
    INSERT INTO job_payloads (job_id, request, prompt_token_ids)
    SELECT id, json_build_object('prompt', repeat(md5(id::text), 8)), array_fill(17, ARRAY[48]) FROM stored
),
results AS (
    INSERT INTO job_results (job_id, attempt, result)
    SELECT id, 1, json_build_object('text', repeat(md5(id::text), 20)) FROM stored
)
INSERT INTO job_chunks (job_id, sequence_number, attempt, chunk)
SELECT id, number, 1, json_build_object('sequence_number', number, 'index', 0, 'text', ' three more tokens',
    'token_ids', json_build_array(5, 6, number)) FROM stored, generate_series(1, :num_chunks) number
"""

SIZES = "SELECT " + ", ".join(f"pg_table_size('{table}'), pg_indexes_size('{table}')" for table in TABLES)
SETTLED = f"""
SELECT bool_and(n_dead_tup <= 50 + coalesce((SELECT option_value::float8 FROM pg_options_to_table(c.reloptions)
    WHERE option_name = 'autovacuum_vacuum_scale_factor'), 0.2) * c.reltuples)
FROM pg_stat_user_tables s JOIN pg_class c ON c.oid = s.relid WHERE s.relname IN {TABLES}
"""


def store(sessions: sessionmaker[Session], num_jobs: int) -> None:
    for start in range(0, num_jobs, BATCH):
        parameters = {"num_jobs": min(BATCH, num_jobs - start), "num_chunks": CHUNKS_PER_JOB}
        with sessions.begin() as session:
            session.execute(text("SET LOCAL statement_timeout = 0"))
            session.execute(text(INSERT), parameters | {"tenant_id": DEFAULT_TENANT_ID})


class OtherClient(threading.Thread):
    """Updates and reads a job of its own, over and over; the janitor must not make it wait."""

    def __init__(self, sessions: sessionmaker[Session]) -> None:
        super().__init__(daemon=True)
        self._sessions = sessions
        self._is_over = threading.Event()
        self.milliseconds: list[float] = []

    def run(self) -> None:
        job_id = "SELECT id FROM jobs WHERE prune_at = 'infinity' ORDER BY id DESC LIMIT 1"
        while not self._is_over.wait(0.01):
            began_at = time.perf_counter()
            with self._sessions.begin() as session:
                session.execute(text(f"UPDATE jobs SET progressed_at = now() WHERE id = ({job_id})"))
            self.milliseconds.append(1000 * (time.perf_counter() - began_at))

    def stop(self) -> list[float]:
        self._is_over.set()
        self.join()
        return sorted(self.milliseconds)


def prune(sessions: sessionmaker[Session], pruner: Janitor) -> dict[str, float]:
    """Everything that is due, as fast as ticks without pauses would."""
    other = OtherClient(sessions)
    other.start()
    began_at, num_pruned = time.perf_counter(), 0
    while num := pruner._prune():
        num_pruned += num
    seconds = time.perf_counter() - began_at
    waits = other.stop()
    return {
        "pruned_jobs": num_pruned,
        "seconds": round(seconds, 1),
        "jobs_per_second": round(num_pruned / seconds),
        "other_client_p50_ms": round(waits[len(waits) // 2], 1),
        "other_client_max_ms": round(waits[-1], 1),
    }


def settle(database: Engine) -> float:
    """Wait until autovacuum has nothing left to do. Returns the seconds."""
    began_at = time.perf_counter()
    with database.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        while time.perf_counter() - began_at < 180 and not connection.scalar(text(SETTLED)):
            time.sleep(1)
    return round(time.perf_counter() - began_at, 1)


def sizes(database: Engine) -> dict[str, float]:
    with database.connect() as connection:
        found = connection.execute(text(SIZES)).one()
    names = [f"{table}_{kind}_mb" for table in TABLES for kind in ("table", "indexes")]
    return {name: round(size / 2**20, 1) for name, size in zip(names, found, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=25_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    rounds: list[dict[str, Any]] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        EmbeddedPostgres(Path(folder) / "postgres", settings={"autovacuum_naptime": "2s"}) as server,
    ):
        migrate(server.url)
        database = open_database(server.url)
        sessions = session_factory(database)
        pruner = Janitor(sessions, redis.Redis(), Catalog([]), Settings())
        janitor.PRUNE_EVERY_SECONDS = 0.0
        store(sessions, options.jobs)
        print(f"{options.jobs:,} jobs, {options.jobs * CHUNKS_PER_JOB:,} chunks: {sizes(database)}", flush=True)
        for number in range(1, options.rounds + 1):
            with sessions.begin() as session:
                session.execute(text("UPDATE jobs SET prune_at = now() WHERE prune_at = 'infinity'"))
            store(sessions, options.jobs)
            figures = prune(sessions, pruner) | {"vacuum_seconds": settle(database)} | sizes(database)
            print(f"round {number}: {figures}", flush=True)
            rounds.append(figures)
        database.dispose()
    print(json.dumps({"jobs": options.jobs, "chunks": options.jobs * CHUNKS_PER_JOB, "rounds": rounds}))


if __name__ == "__main__":
    main()
