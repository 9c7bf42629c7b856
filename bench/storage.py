"""Measures the job protocol's statements on a new embedded PostgreSQL with fsync on: `python -m bench.storage`.

Prints the ceiling (an empty COMMIT of one row), then each statement, then one JSON line.
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from uuid import UUID, uuid4

from sqlalchemy import text
from sqlalchemy.orm import Session, sessionmaker
from ulid import ULID

from domain.jobs import FinishReason, JobStatus, Usage
from domain.requests import GenerationRequest, GenerationResult, ResultChoice, SamplingParams, TokenChunk
from local.servers import EmbeddedPostgres
from storage import job_accept, jobs
from storage.database import migrate, open_database, session_factory
from storage.job_accept import NewJob
from storage.jobs import ChunkCommit, ClaimedJob, Finalisation
from storage.tables import DEFAULT_TENANT_ID

MODEL = "bench"


def new_job(tenant_id: UUID = DEFAULT_TENANT_ID) -> NewJob:
    params = SamplingParams(max_tokens=64, temperature=0.7, top_p=0.9, top_k=0, seed=1)
    return NewJob(
        id=UUID(bytes=ULID().bytes),
        tenant_id=tenant_id,
        request=GenerationRequest(model=MODEL, prompt="Tell me a story about a fox. " * 4, params=params),
        prompt_token_ids=list(range(100, 148)),
        model_revision="main",
        max_tokens=64,
        seed=1,
        max_failures=3,
        result_ttl_seconds=86_400,
        request_hash=os.urandom(32),
        idempotency_key=uuid4().hex,
    )


def timed(sessions: sessionmaker[Session], statement: Callable[[Session], object], *, repeats: int) -> list[float]:
    """Milliseconds of each run of `statement` and its COMMIT."""
    milliseconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        with sessions.begin() as session:
            statement(session)
        milliseconds.append((time.perf_counter() - started) * 1000)
    return milliseconds


def report(name: str, milliseconds: list[float], *, jobs_per_call: int, figures: dict[str, float]) -> None:
    p50 = statistics.median(milliseconds)
    p99 = sorted(milliseconds)[int(len(milliseconds) * 0.99)]
    rate = jobs_per_call * 1000 / statistics.mean(milliseconds)
    figures[f"{name}_p50_ms"], figures[f"{name}_per_second"] = round(p50, 2), round(rate)
    print(f"{name:28} p50 {p50:7.2f} ms   p99 {p99:7.2f} ms   {rate:9.0f} jobs/s", flush=True)


def accept_and_claim(sessions: sessionmaker[Session], num_jobs: int, owner: UUID) -> list[ClaimedJob]:
    claimed: list[ClaimedJob] = []
    with sessions.begin() as session:
        job_accept.accept(session, [new_job() for _ in range(num_jobs)], max_queued_jobs=10**6)
    with sessions.begin() as session:
        claimed = jobs.claim(session, MODEL, limit=num_jobs, owner=owner, model_revision="main", lease_seconds=60)
    assert len(claimed) == num_jobs
    return claimed


def _accept_next(groups: Iterator[list[NewJob]], session: Session) -> None:
    job_accept.accept(session, next(groups), max_queued_jobs=10**6)


def bench_accept(sessions: sessionmaker[Session], figures: dict[str, float]) -> None:
    for size in (1, 16, 64):
        groups = iter([[new_job() for _ in range(size)] for _ in range(100)])
        accept = partial(_accept_next, groups)
        milliseconds = timed(sessions, accept, repeats=100)
        report(f"accept {size}", milliseconds, jobs_per_call=size, figures=figures)


def bench_claim(sessions: sessionmaker[Session], figures: dict[str, float]) -> None:
    """Claim from the backlog that bench_accept left."""
    owner = uuid4()
    for size in (1, 16, 64):
        claim = partial(jobs.claim, model=MODEL, limit=size, owner=owner, model_revision="main", lease_seconds=60)
        report(f"claim {size}", timed(sessions, claim, repeats=30), jobs_per_call=size, figures=figures)
    claim_one = partial(jobs.claim, model=MODEL, limit=1, owner=owner, model_revision="main", lease_seconds=60)

    def claim_surely(session: Session) -> None:
        claim_one(session)
        session.execute(text("SET LOCAL synchronous_commit = on"))

    statements: tuple[Callable[[Session], object], ...] = (claim_one, claim_surely)
    by_turns: dict[str, list[float]] = {"claim 1 by turns": [], "claim 1, waiting for the disk": []}
    for _ in range(60):
        for milliseconds, statement in zip(by_turns.values(), statements, strict=True):
            milliseconds += timed(sessions, statement, repeats=1)
    for name, milliseconds in by_turns.items():
        report(name, milliseconds, jobs_per_call=1, figures=figures)


def bench_running_batch(sessions: sessionmaker[Session], figures: dict[str, float]) -> None:
    for size in (64, 256):
        owner = uuid4()
        claimed = accept_and_claim(sessions, size, owner)
        number = iter(range(1, 1000))

        def flush(session: Session, claimed: list[ClaimedJob] = claimed) -> None:
            chunk = TokenChunk(sequence_number=next(number), text=" three more tokens", token_ids=(5, 6, 7))  # noqa: B023
            held = jobs.commit_chunks(
                session, [ChunkCommit(j.id, j.attempt, [chunk]) for j in claimed], lease_seconds=60
            )
            assert len(held) == len(claimed)

        report(f"commit_chunks {size}", timed(sessions, flush, repeats=30), jobs_per_call=size, figures=figures)
        ids = [job.id for job in claimed]
        renew = timed(sessions, lambda s, i=ids, o=owner: jobs.renew(s, i, owner=o, lease_seconds=60), repeats=20)  # type: ignore[misc]
        report(f"renew {size}", renew, jobs_per_call=size, figures=figures)
        choice = ResultChoice(index=0, text="word " * 60, finish_reason=FinishReason.STOP, num_tokens=90)
        result = GenerationResult(choices=(choice,), usage=Usage(prompt_tokens=48, completion_tokens=90))
        endings = [Finalisation(j.id, j.attempt, 30, JobStatus.COMPLETED, result, FinishReason.STOP) for j in claimed]
        groups = iter([endings[start : start + 16] for start in range(0, size, 16)])
        finalise = timed(sessions, lambda s, g=groups: jobs.finalise(s, next(g)), repeats=size // 16)  # type: ignore[misc]
        report(f"finalise 16 of {size}", finalise, jobs_per_call=16, figures=figures)


def main() -> None:
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="celeriac-bench-") as folder, EmbeddedPostgres(Path(folder)) as server:
        migrate(server.url)
        database = open_database(server.url)
        sessions = session_factory(database)
        with sessions.begin() as session:
            session.execute(text("CREATE TABLE ceiling (n int)"))
        ceiling = timed(sessions, lambda s: s.execute(text("INSERT INTO ceiling VALUES (1)")), repeats=200)
        report("ceiling: one-row commit", ceiling, jobs_per_call=1, figures=figures)
        bench_accept(sessions, figures)
        bench_claim(sessions, figures)
        bench_running_batch(sessions, figures)
        database.dispose()
    print(json.dumps({"bench": "storage", "cpus": os.cpu_count(), **figures}))


if __name__ == "__main__":
    main()
