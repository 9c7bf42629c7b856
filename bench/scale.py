"""What saturates first from 1 to 1,000 workers, by measured costs: `python -m bench.scale [--measure]`.

Prints the table of docs/scale.md. With --measure, takes the costs again, in CPU: of PostgreSQL for each statement, of
Redis for publishing a chunk, of the API for turning it into an event.
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from uuid import uuid4

from sqlalchemy.orm import Session

# Seconds of one core, measured: bench/results/2026-11-two-cores.md, `bench.api_costs` and "Storage for years".
ACCEPT_API = 1.3e-3  # a job, in the API
ACCEPT_SQL, CLAIM_SQL, FINALISE_SQL = 342e-6, 410e-6, 449e-6  # a job in groups of 64, 16 and 16, in PostgreSQL
FLUSH_SQL = 122e-6  # a chunk in a flush of 64, in PostgreSQL
PUBLISH = 5e-6  # a chunk, in Redis, with one reader
EVENT_API = 40e-6  # a chunk for one reader, in the API: 9 to 18, and an estimate for event loop and socket
JOB_BYTES, CHUNK_BYTES, TOKEN_BYTES = 2_400, 170, 9  # on disk, with indexes

# What one server takes before waits grow.
BUSY = 0.7  # of a core
SQL_CORES = 32  # of one PostgreSQL with a fast disk; commits are grouped, so that the disk is not the first to be busy
CONNECTIONS_PER_WORKER, CONNECTIONS_PER_API, MAX_CONNECTIONS = 2, 34, 5_000
STREAMS_PER_API = 4_000  # CELERIAC_MAX_STREAMS


@dataclass(frozen=True)
class Load:
    """All workers are busy with jobs of average length."""

    num_workers: int
    slots: int = 64
    tokens_per_second: float = 40.0  # of one sequence
    tokens_per_job: int = 300
    flush_seconds: float = 0.5  # CELERIAC_FLUSH_MAX_SECONDS
    watched: float = 1.0  # open streams per running job

    @property
    def running(self) -> int:
        return self.num_workers * self.slots

    @property
    def jobs_per_second(self) -> float:
        return self.running * self.tokens_per_second / self.tokens_per_job

    @property
    def chunks_per_second(self) -> float:
        return self.running / self.flush_seconds


@dataclass(frozen=True)
class Need:
    sql_cores: float
    redis_cores: float
    num_apis: int
    connections: int
    gigabytes_per_day: float

    @property
    def saturated(self) -> list[str]:
        """The servers of which there is one, in the order in which they give out."""
        shares = {
            "PostgreSQL": self.sql_cores / (BUSY * SQL_CORES),
            "Redis": self.redis_cores / BUSY,
            "connections": self.connections / MAX_CONNECTIONS,
        }
        return [name for name, share in sorted(shares.items(), key=lambda item: -item[1]) if share > 1]


def need(load: Load) -> Need:
    jobs, chunks = load.jobs_per_second, load.chunks_per_second
    streams = load.running * load.watched
    api_cores = jobs * ACCEPT_API + chunks * load.watched * EVENT_API
    num_apis = max(1, math.ceil(api_cores / BUSY), math.ceil(streams / STREAMS_PER_API))
    return Need(
        sql_cores=jobs * (ACCEPT_SQL + CLAIM_SQL + FINALISE_SQL) + chunks * FLUSH_SQL,
        redis_cores=chunks * PUBLISH,
        num_apis=num_apis,
        connections=load.num_workers * CONNECTIONS_PER_WORKER + num_apis * CONNECTIONS_PER_API,
        gigabytes_per_day=86_400
        * (jobs * (JOB_BYTES + load.tokens_per_job * TOKEN_BYTES) + chunks * CHUNK_BYTES)
        / 1e9,
    )


HEAD = (
    "workers",
    "running jobs",
    "streams",
    "jobs a day",
    "flush, s",
    "API processes",
    "PostgreSQL cores",
    "Redis cores",
    "GB a day",
    "too much for",
)
LOADS = (
    *(Load(num_workers, flush_seconds=0.5) for num_workers in (1, 10, 100, 300, 1_000)),
    Load(1_000, flush_seconds=2.0),
    Load(1_000, flush_seconds=2.0, watched=1_000_000 / 64_000),
)


def table() -> Iterator[str]:
    yield f"| {' | '.join(HEAD)} |"
    yield "|" + "---|" * len(HEAD)
    for load in LOADS:
        found = need(load)
        cells = (
            f"{load.num_workers:,}",
            f"{load.running:,}",
            f"{load.running * load.watched:,.0f}",
            f"{86_400 * load.jobs_per_second:,.0f}",
            f"{load.flush_seconds:g}",
            str(found.num_apis),
            f"{found.sql_cores:.1f}",
            f"{found.redis_cores:.2f}",
            f"{found.gigabytes_per_day:,.0f}",
            ", ".join(found.saturated) or "–",
        )
        yield f"| {' | '.join(cells)} |"


def measure_streams() -> dict[str, float]:
    """Microseconds of CPU per chunk: of Redis for a PUBLISH with one subscriber, and of the API for one event."""
    import psutil
    import redis

    from api.events import (
        event_of,
    )
    from api.sse import (
        frame,
    )
    from domain.requests import TokenChunk
    from local.servers import EmbeddedRedis
    from storage.stream_channels import channel_of
    from storage.streams import StreamMessage, publish

    chunk = TokenChunk(sequence_number=7, index=0, text=" twenty tokens of text" * 4, token_ids=tuple(range(20)))
    ids = [uuid4() for _ in range(64)]
    rounds = 500
    with (
        tempfile.TemporaryDirectory() as folder,
        EmbeddedRedis(Path(folder) / "redis") as server,
        redis.Redis.from_url(server.url) as client,
        client.pubsub() as reader,
    ):
        reader.subscribe(*map(channel_of, ids))
        assert server.pid is not None
        process = psutil.Process(server.pid)
        before = sum(process.cpu_times()[:2])
        for _ in range(rounds):
            publish(client, [(job_id, chunk) for job_id in ids])
            for _ in ids:
                reader.get_message(timeout=5)
        spent = sum(process.cpu_times()[:2]) - before
    message = StreamMessage(chunk=chunk).model_dump_json(exclude_defaults=True)
    began_at = time.process_time()
    for _ in range(20_000):
        found = StreamMessage.model_validate_json(message).chunk
        assert found is not None
        frame(*event_of(found, "job_01"), id=7)
    event = (time.process_time() - began_at) / 20_000
    return {"publish_us": round(1e6 * spent / rounds / len(ids), 1), "event_us": round(1e6 * event, 1)}


def measure_sql() -> dict[str, float]:
    """Microseconds of PostgreSQL's CPU per job or chunk, which hardly depend on what else the machine does."""
    from bench.storage import MODEL, new_job
    from domain.jobs import FinishReason, JobStatus, Usage
    from domain.requests import GenerationResult, ResultChoice, TokenChunk
    from local.servers import EmbeddedPostgres
    from storage import job_accept, jobs
    from storage.database import migrate, open_database, session_factory
    from storage.jobs import ChunkCommit, ClaimedJob, Finalisation

    costs: dict[str, float] = {}
    owner = uuid4()
    claimed: list[ClaimedJob] = []
    with tempfile.TemporaryDirectory() as folder, EmbeddedPostgres(Path(folder) / "postgres") as server:
        migrate(server.url)
        database = open_database(server.url, pool_size=1, max_overflow=0)
        sessions = session_factory(database)

        def cpu_of(name: str, num: int, steps: Iterator[Callable[[Session], object]]) -> None:
            before = _cpu_of_children(server.pid)
            for step in steps:
                with sessions.begin() as session:
                    step(session)
            costs[f"{name}_us"] = round(1e6 * (_cpu_of_children(server.pid) - before) / num, 1)

        groups = [[new_job() for _ in range(64)] for _ in range(16)]
        accepts = (lambda s, g=group: job_accept.accept(s, g, max_queued_jobs=10**6) for group in groups)
        claim = partial(jobs.claim, model=MODEL, limit=16, owner=owner, model_revision="main", lease_seconds=600)
        claims = (lambda s: claimed.extend(claim(s)) for _ in range(64))
        cpu_of("accept_sql", 1024, iter(accepts))
        cpu_of("claim_sql", 1024, iter(claims))

        def flush(session: Session, number: int, batch: list[ClaimedJob]) -> None:
            chunk = TokenChunk(sequence_number=number, index=0, text=" twenty tokens" * 5, token_ids=tuple(range(20)))
            jobs.commit_chunks(session, [ChunkCommit(j.id, j.attempt, [chunk]) for j in batch], lease_seconds=600)

        batches = [claimed[start : start + 64] for start in range(0, 1024, 64)]
        flushes = (partial(flush, number=n, batch=batch) for n in range(1, 16) for batch in batches)
        cpu_of("flush_sql", 15 * 1024, iter(flushes))
        choice = ResultChoice(index=0, text=" twenty tokens" * 75, finish_reason=FinishReason.STOP, num_tokens=300)
        result = GenerationResult(choices=(choice,), usage=Usage(prompt_tokens=48, completion_tokens=300))
        ends = [Finalisation(j.id, j.attempt, 15, JobStatus.COMPLETED, result, FinishReason.STOP) for j in claimed]
        finalises = (lambda s, g=ends[i : i + 16]: jobs.finalise(s, g) for i in range(0, 1024, 16))
        cpu_of("finalise_sql", 1024, iter(finalises))
        database.dispose()
    return costs


def _cpu_of_children(pid: int | None) -> float:
    import psutil

    return sum(sum(child.cpu_times()[:2]) for child in psutil.Process(pid).children(recursive=True))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", action="store_true")
    if parser.parse_args().measure:
        print(json.dumps(measure_streams() | measure_sql()))
    print("\n".join(table()))
