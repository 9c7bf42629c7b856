"""Many readers of live streams on one API process: how late a chunk arrives, and what a stream costs.

    python -m bench.subscribers                     # 10,000 readers of 200 jobs: two minutes
    python -m bench.subscribers --readers 1000 --chunks-per-second 200
    python -m bench.subscribers --jobs 1            # all of them read one job
    python -m bench.subscribers --per-second 1e6    # all of them arrive at once
    python -m bench.subscribers --restart           # the server is restarted, and all come back at once
    python -m bench.subscribers --slow 500          # and five hundred that read nothing of ten jobs with long texts

A program that does what a worker does commits chunks to the jobs in turn and publishes them; each carries the time just
before its commit, so what is measured is more than the time from commit to receipt, by the commit, which is told, too.
The readers are a process of their own (bench/sse_listeners.py). The ceiling is the same bytes sent by a bare asyncio
server, which is what one process could do at best. The last line is JSON.
"""

import argparse
import asyncio
import json
import os
import platform
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
import psutil
import redis
from sqlalchemy.orm import Session, sessionmaker

from bench.accept import cpu_seconds, server
from domain.jobs import external_id
from domain.requests import TokenChunk
from local.servers import EmbeddedPostgres, EmbeddedRedis
from settings import ROOT
from storage import jobs
from storage.database import migrate, open_database, session_factory
from storage.jobs import ChunkCommit
from storage.streams import publish

MODEL = "fake"
MODELS = f"""
[[models]]
id = "{MODEL}"
path = "fake"
backend = "fake"
max_model_len = 1000000
"""
LEASE_SECONDS = 3600.0
PER_COMMIT = 16  # jobs, as a worker's flush has many
SLOW_JOBS, SLOW_TEXT = 10, "x" * 16_384  # what slow readers do not read: two of these a second and reader
SERVE = "from api.server import serve; from settings import get_settings; serve(get_settings())"


@dataclass(slots=True)
class Writer:
    """Commits and publishes as a worker does."""

    sessions: sessionmaker[Session]
    client: "redis.Redis"
    attempts: dict[UUID, int] = field(default_factory=dict)
    numbers: dict[UUID, int] = field(default_factory=dict)
    commit_seconds: list[float] = field(default_factory=list)
    long_ids: list[UUID] = field(default_factory=list)  # of those jobs that slow readers do not read

    def claim(self, num_jobs: int) -> None:
        with self.sessions.begin() as session:
            claimed = jobs.claim(
                session, MODEL, limit=num_jobs, owner=uuid4(), model_revision="fake:main", lease_seconds=LEASE_SECONDS
            )
        self.attempts = {job.id: job.attempt for job in claimed}
        self.numbers = dict.fromkeys(self.attempts, 0)
        if len(claimed) != num_jobs:
            raise RuntimeError(f"{len(claimed)} of {num_jobs} jobs were claimed")

    def write_for(self, seconds: float, chunks_per_second: float) -> None:
        ids = [job_id for job_id in self.attempts if job_id not in self.long_ids]
        at_once = min(PER_COMMIT, len(ids))
        ends_at, due_at, first = time.monotonic() + seconds, time.monotonic(), 0
        while time.monotonic() < ends_at:
            self._write([ids[(first + number) % len(ids)] for number in range(at_once)])
            first += at_once
            due_at += at_once / chunks_per_second
            time.sleep(max(0.0, due_at - time.monotonic()))

    def _write(self, ids: list[UUID]) -> None:
        short = f"t{time.monotonic_ns()} and a few words more"
        chunks = {}
        for job_id in (*ids, *self.long_ids):
            self.numbers[job_id] += 1
            text = SLOW_TEXT if job_id in self.long_ids else short
            chunks[job_id] = TokenChunk(sequence_number=self.numbers[job_id], text=text, token_ids=(1, 2, 3, 4))
        began_at = time.monotonic()
        with self.sessions.begin() as session:
            commits = [ChunkCommit(job_id, self.attempts[job_id], [chunk]) for job_id, chunk in chunks.items()]
            jobs.commit_chunks(session, commits, lease_seconds=LEASE_SECONDS)
        self.commit_seconds.append(time.monotonic() - began_at)
        publish(self.client, list(chunks.items()))


@contextmanager
def listeners(given: argparse.Namespace, port: int, folder: Path) -> Iterator["subprocess.Popen[str]"]:
    """Once all of them are connected."""
    command = [sys.executable, "-m", "bench.sse_listeners", "--port", str(port), "--paths", str(folder / "paths.txt")]
    command += ["--connections", str(given.readers), "--slow", str(given.slow), "--per-second", str(given.per_second)]
    command += ["--slow-paths", str(folder / "slow_paths.txt")]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        if not (line := process.stdout.readline()).startswith("open"):
            raise RuntimeError(f"not all readers were let in: {line}")
        yield process
    finally:
        process.kill()
        process.wait()


def tell(process: "subprocess.Popen[str]") -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def pss_bytes(process: psutil.Process) -> int:
    return int(process.memory_full_info().pss)


def submit(port: int, num_jobs: int) -> list[str]:
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
        body = {"model": MODEL, "prompt": "A story", "params": {"max_tokens": 900_000}}
        return [http.post("/v1/jobs", json=body).raise_for_status().json()["id"] for _ in range(num_jobs)]


def measure(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    (folder / "models.toml").write_text(MODELS)
    with EmbeddedPostgres(folder / "postgres") as postgres, EmbeddedRedis(folder / "redis") as redis_server:
        migrate(postgres.url)
        environment = {
            "CELERIAC_DATABASE_URL": postgres.url,
            "CELERIAC_REDIS_URL": redis_server.url,
            "CELERIAC_MODELS_FILE": str(folder / "models.toml"),
            "CELERIAC_MAX_STREAMS": str(given.readers + given.slow + 100),
            "CELERIAC_AUTH": "none",
            "CELERIAC_PORT": str(_free_port()),  # the same after a restart
        }
        num_jobs = given.jobs + (SLOW_JOBS if given.slow else 0)
        database = open_database(postgres.url)
        writer = Writer(session_factory(database), redis.Redis.from_url(redis_server.url))
        serve = partial(server, [sys.executable, "-c", SERVE], environment, folder / "api.log")
        with ExitStack() as stack:
            process, port = stack.enter_context(serve())
            submit(port, num_jobs)
            writer.claim(num_jobs)
            write_paths(folder, writer, num_slow_jobs=num_jobs - given.jobs)
            memory_before, cpu_before = pss_bytes(process), cpu_seconds(process)
            readers = stack.enter_context(listeners(given, port, folder))
            opening_cpu = cpu_seconds(process) - cpu_before
            report = {"api_cpu_us_a_beginning": round(1e6 * opening_cpu / (given.readers + given.slow))}
            if given.restart:
                process.terminate()
                process.wait(timeout=30)
                process, _ = stack.enter_context(serve())
                # Until all of them are back, they are late; what they get is complete, or it would count as wrong.
            report |= _measure_streams(given, writer, process, readers, memory_before)
        database.dispose()
    return report


def write_paths(folder: Path, writer: Writer, *, num_slow_jobs: int) -> None:
    ids = list(writer.attempts)
    writer.long_ids = ids[:num_slow_jobs]
    for name, some in (("slow_paths", ids[:num_slow_jobs]), ("paths", ids[num_slow_jobs:])):
        lines = "\n".join(f"/v1/jobs/{external_id(job_id)}/events" for job_id in some)
        (folder / f"{name}.txt").write_text(lines)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def _measure_streams(
    given: argparse.Namespace,
    writer: Writer,
    process: psutil.Process,
    readers: "subprocess.Popen[str]",
    memory_before: int,
) -> dict[str, Any]:
    writer.write_for(3.0, given.chunks_per_second)  # all streams are live
    idle_from, memory_open = cpu_seconds(process), pss_bytes(process)
    time.sleep(5.0)
    idle_cpu = (cpu_seconds(process) - idle_from) / 5.0
    writer.commit_seconds.clear()
    tell(readers)
    cpu_before = cpu_seconds(process)
    writer.write_for(given.seconds, given.chunks_per_second)
    time.sleep(2.0)
    cpu = cpu_seconds(process) - cpu_before
    memory_after = pss_bytes(process)
    tell(readers)
    assert readers.stdout is not None
    seen = json.loads(readers.stdout.readline())
    num_streams = given.readers + given.slow
    return {
        "readers": given.readers,
        "slow": given.slow,
        "jobs": given.jobs,
        **seen,
        "commit_ms_p50": round(1000 * statistics.median(writer.commit_seconds), 1),
        "kib_a_stream": round((memory_open - memory_before) / num_streams / 1024, 1),
        "kib_a_stream_after": round((memory_after - memory_before) / num_streams / 1024, 1),
        "api_cpu_us_an_event": round(1e6 * cpu / max(1, seen["events"]), 1),
        "api_cpu_share": round(cpu / (given.seconds + 2.0), 2),
        "api_cpu_share_idle": round(idle_cpu, 2),
    }


async def ceiling_us(num_events: int = 200_000) -> float:
    """CPU of a bare asyncio server for one event of the same size: a write to a socket that somebody reads."""
    body = b"id: 7\nevent: output.delta\ndata: " + b"x" * 150 + b"\n\n"
    chunk = b"%x\r\n%b\r\n" % (len(body), body)

    async def send(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for number in range(num_events):
            writer.write(chunk)
            if number % 64 == 0:
                await writer.drain()
        writer.close()

    listening = await asyncio.start_server(send, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    drain = f"import socket; s = socket.create_connection(('127.0.0.1', {port}))\nwhile s.recv(1 << 20): pass"
    began_at = time.process_time()
    process = await asyncio.create_subprocess_exec(sys.executable, "-I", "-c", drain)
    await process.wait()
    return 1e6 * (time.process_time() - began_at) / num_events


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readers", type=int, default=10_000)
    parser.add_argument("--slow", type=int, default=0, help="more, which read nothing")
    parser.add_argument("--per-second", type=float, default=1_000.0, help="how many readers arrive")
    parser.add_argument("--restart", action="store_true", help="of the server, before anything is measured")
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--chunks-per-second", type=float, default=32.0, help="of all jobs together")
    parser.add_argument("--seconds", type=float, default=20.0)
    given = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    ceiling = asyncio.run(ceiling_us())
    print(f"ceiling: a bare server takes {ceiling:.1f} us of CPU for an event")
    with tempfile.TemporaryDirectory(prefix="celeriac-subscribers-") as name:
        os.chmod(name, 0o755)
        report = measure(given, Path(name)) | {"ceiling_us": round(ceiling, 1), "load": round(os.getloadavg()[0], 1)}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
