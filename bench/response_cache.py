"""Measures answers from the response cache: `python -m bench.response_cache`.

One API process with CELERIAC_RESPONSE_CACHE=greedy, PostgreSQL with fsync on, Redis. Each route is asked the same
greedy question over and over; its first job is completed by hand, as there is no worker. Prints the ceiling (the same
requests as new jobs that are only accepted, each with another prompt), then the hits, then one JSON line.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import orjson
from sqlalchemy import Engine, text

from bench.accept import measured, server
from domain.jobs import FinishReason, JobStatus, Usage
from domain.requests import GenerationResult, ResultChoice, TokenChunk
from local.servers import EmbeddedPostgres, EmbeddedRedis
from storage import jobs
from storage.database import migrate, open_database, session_factory
from storage.jobs import ChunkCommit, Finalisation

MODEL = "celeriac-mini"
ANSWER = "A fox who had never seen water deeper than a puddle learned to swim. " * 4
NUM_TOKENS = 64
SERVE = "from api.server import serve; from settings import get_settings; serve(get_settings())"
MESSAGES = [{"role": "user", "content": "Tell me a short story about a fox who learns to swim."}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/jobs": {"messages": MESSAGES, "params": {"max_tokens": NUM_TOKENS, "temperature": 0}},
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": NUM_TOKENS + 1, "temperature": 0},
    "/api/v1/infer": {"prompt": "A fox who learns to swim", "max_tokens": NUM_TOKENS, "temperature": 0},
}


def complete_next(database: Engine) -> None:
    """Complete the job that waits, as a worker would."""
    sessions = session_factory(database)
    with sessions() as session:
        while not (revision := session.scalar(text("SELECT model_revision FROM jobs WHERE status = 'queued' LIMIT 1"))):
            session.rollback()
            time.sleep(0.05)
    with sessions.begin() as session:
        [job] = jobs.claim(session, MODEL, limit=1, owner=uuid4(), model_revision=revision, lease_seconds=60)
    reason, ids = FinishReason.LENGTH, tuple(range(NUM_TOKENS))
    chunk = TokenChunk(sequence_number=1, text=ANSWER, token_ids=ids, finish_reason=reason)
    choice = ResultChoice(index=0, text=ANSWER, finish_reason=reason, num_tokens=NUM_TOKENS)
    result = GenerationResult(choices=(choice,), usage=Usage(prompt_tokens=9, completion_tokens=NUM_TOKENS))
    with sessions.begin() as session:
        jobs.commit_chunks(session, [ChunkCommit(job.id, job.attempt, [chunk])], lease_seconds=60)
        jobs.finalise(session, [Finalisation(job.id, job.attempt, 1, JobStatus.COMPLETED, result, reason)])


def ask_first(port: int, path: str, body: dict[str, Any], database: Engine) -> None:
    """The request whose answer the others get."""
    completing = threading.Thread(target=complete_next, args=(database,))
    completing.start()
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        client.post(path, json=body, headers={"prefer": "wait=30"}).raise_for_status()
        completing.join()
        again = client.post(path, json=body).raise_for_status()
    assert again.headers["x-celeriac-cache"] == "hit", again.text


def run(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    with EmbeddedPostgres(folder / "postgres") as postgres, EmbeddedRedis(folder / "redis") as redis:
        migrate(postgres.url)
        database = open_database(postgres.url)
        environment = {
            "CELERIAC_DATABASE_URL": postgres.url,
            "CELERIAC_REDIS_URL": redis.url,
            "CELERIAC_MAX_QUEUED_JOBS": str(10**8),
            "CELERIAC_RESPONSE_CACHE": "greedy",
            "CELERIAC_NO_WORKERS_SECONDS": "86400",
            "CELERIAC_PORT": "0",
        }
        options = {"seconds": given.seconds, "connections": given.connections, "rate": None}
        with server([sys.executable, "-c", SERVE], environment, folder / "api.log") as (process, port):
            for path, fields in BODIES.items():
                body = {"model": MODEL} | fields
                ask_first(port, path, body, database)
                file = folder / "body.json"
                file.write_bytes(orjson.dumps(body))
                figures[path], _ = measured(f"hits, {path}", process, port, file, path=path, **options)
            fresh = {"model": MODEL, "use_cache": False} | BODIES["/v1/jobs"]
            file.write_bytes(orjson.dumps(fresh))
            figures["accept"], _ = measured(
                "ceiling: accepted, not run", process, port, file, path="/v1/jobs", **options
            )
        database.dispose()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--connections", type=int, default=64)
    given = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    with tempfile.TemporaryDirectory(prefix="celeriac-bench-", ignore_cleanup_errors=True) as folder:
        figures = run(Path(folder), given)
    print(json.dumps({"bench": "response_cache", **figures}))


if __name__ == "__main__":
    main()
