"""What a pooler costs: the job protocol's statements directly and through PgBouncer in both of its modes, by turns.

    python -m bench.pooled                              # half a minute; needs a pgbouncer on PATH or in /usr/sbin

Each way keeps what it can: directly and in session mode plans are kept as long as in the API, and a claim is a
statement of its own; in transaction mode each statement is planned when it comes, and the settings travel with it. The
ceiling is a commit of one row, without a pooler. Prints milliseconds of client and of PostgreSQL's CPUs, and one line
of JSON.
"""

import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

import psutil
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session, sessionmaker

from bench.storage import MODEL, new_job
from domain.requests import TokenChunk
from local.servers import EmbeddedPostgres
from storage import job_accept, jobs
from storage.database import keep_plans, migrate, open_database, session_factory, statement_factory
from storage.jobs import ChunkCommit
from tasks.accept import PLAN_SECONDS
from tests.pooler import PGBOUNCER, Pooler

ROUNDS = 60
NUM_JOBS = 8  # per round and way
LEASE_SECONDS = 60


@dataclass(slots=True)
class Way:
    database: Engine
    milliseconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    cpu_milliseconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    @property
    def transactions(self) -> sessionmaker[Session]:
        return session_factory(self.database)

    def take(self, name: str, cpu: Callable[[], float], work: Callable[[], object]) -> object:
        cpu_before, began_at = cpu(), time.perf_counter()
        done = work()
        self.milliseconds[name].append((time.perf_counter() - began_at) * 1000)
        self.cpu_milliseconds[name].append((cpu() - cpu_before) * 1000)
        return done

    def round(self, cpu: Callable[[], float]) -> None:
        """Some jobs are accepted, claimed, and get a chunk, as workers and the API do these."""
        owner = uuid4()

        def accept() -> None:
            with self.transactions.begin() as session:
                job_accept.accept(session, [new_job() for _ in range(NUM_JOBS)], max_queued_jobs=10**6)

        def claim() -> list[jobs.ClaimedJob]:
            with statement_factory(self.transactions)() as session:
                return jobs.claim(
                    session, MODEL, limit=NUM_JOBS, owner=owner, model_revision="main", lease_seconds=LEASE_SECONDS
                )

        self.take("accept", cpu, accept)
        claimed = self.take("claim", cpu, claim)
        assert isinstance(claimed, list)
        chunk = TokenChunk(sequence_number=1, text=" three more tokens", token_ids=(5, 6, 7))

        def flush() -> None:
            chunks = [ChunkCommit(job.id, job.attempt, [chunk]) for job in claimed]
            with statement_factory(self.transactions)() as session:
                jobs.commit_chunks(session, chunks, lease_seconds=LEASE_SECONDS, owner=owner)

        self.take("flush", cpu, flush)

        def read() -> None:
            with self.transactions() as session:
                session.execute(text("SELECT count(*) FROM workers"))

        self.take("read", cpu, read)


def cpu_of(server: EmbeddedPostgres) -> Callable[[], float]:
    """Seconds of all sessions of PostgreSQL."""
    assert server.pid is not None
    process = psutil.Process(server.pid)

    def seconds() -> float:
        return sum(sum(child.cpu_times()[:2]) for child in process.children())

    return seconds


def report(ways: Mapping[str, Way], ceiling: float) -> dict[str, float]:
    print(f"ceiling: a commit of one row takes {ceiling:.2f} ms")
    figures = {"ceiling_ms": round(ceiling, 2)}
    for name in ("accept", "claim", "flush", "read"):
        for way, taken in ways.items():
            p50, cpu = statistics.median(taken.milliseconds[name]), statistics.mean(taken.cpu_milliseconds[name])
            figures[f"{name}_{way}_ms"], figures[f"{name}_{way}_cpu_ms"] = round(p50, 2), round(cpu, 2)
            print(f"{name:8} {way:12} p50 {p50:6.2f} ms   PostgreSQL {cpu:6.2f} ms of CPU")
    return figures


def main() -> None:
    if PGBOUNCER is None:
        raise SystemExit("there is no pgbouncer; on Debian: apt-get install pgbouncer")
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="celeriac-bench-"))
        server = stack.enter_context(EmbeddedPostgres(Path(folder)))
        migrate(server.url)
        urls = {"direct": server.url}
        for mode in ("session", "transaction"):
            urls[mode] = stack.enter_context(Pooler(server.url, mode)).url
        ways = {name: Way(open_database(url, pool_size=1, repeats_calls=True)) for name, url in urls.items()}
        for way in ways.values():
            keep_plans(way.database, seconds=PLAN_SECONDS)
            stack.callback(way.database.dispose)
        with ways["direct"].transactions.begin() as session:
            session.execute(text("CREATE TABLE ceiling (n int)"))
        cpu, commits = cpu_of(server), []
        for _ in range(ROUNDS):
            began_at = time.perf_counter()
            with ways["direct"].transactions.begin() as session:
                session.execute(text("INSERT INTO ceiling VALUES (1)"))
            commits.append((time.perf_counter() - began_at) * 1000)
            for way in ways.values():
                way.round(cpu)
        figures = report(ways, statistics.median(commits))
    print(json.dumps({"bench": "pooled", "cpus": os.cpu_count(), "load": round(os.getloadavg()[0], 1), **figures}))


if __name__ == "__main__":
    main()
