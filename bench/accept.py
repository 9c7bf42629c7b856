"""Measures how fast one API process accepts jobs with fsync on, and where the time goes: `python -m bench.accept`.

Prints the ceilings (the load generator against an application that does nothing; the accept statement without HTTP),
then the measurement (closed loop, and open loop at --rate with latencies from when each request was due), then the CPU
time of one job by stage, then one JSON line. Jobs are accepted and dispatched but not run, since there is no worker.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
import psutil

from api.model_queues import ModelQueue
from dialects.bodies import parse_model
from dialects.native import JobBody, QueueView, new_job_view
from domain.catalog import Catalog
from domain.eta import Load
from domain.jobs import new_id
from local.servers import EmbeddedPostgres, EmbeddedRedis
from observability import configure_logging
from settings import ROOT, get_settings
from storage import job_accept
from storage.database import migrate, open_database, session_factory
from storage.job_accept import NewJob
from storage.tables import DEFAULT_TENANT_ID
from tasks import job_log
from tasks.known_requests import ReadyRequest
from tasks.prepare import prepare_generation, resolve_params
from tasks.submit import fingerprint, make_job, request_hash
from text.models import ModelView, load_model_view

LISTENING = re.compile(r"http://127\.0\.0\.1:(\d+)")
GROUP = 64
NUM_REPEATS = 2_000


def request_body() -> bytes:
    message = {"role": "user", "content": "Tell me a short story about a fox who learns to swim."}
    body = {
        "model": "celeriac-mini",
        "messages": [message],
        "params": {"max_tokens": 64, "temperature": 0.7, "stop": ["###"]},
        "metadata": {"user": "u-1729", "trace": "8f14e45fceea167a"},
    }
    return orjson.dumps(body)


@contextmanager
def server(
    command: list[str], environment: dict[str, str], log: Path, root: Path = ROOT
) -> Iterator[tuple[psutil.Process, int]]:
    """A server process and its port, once it has logged where it listens."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=root, env=os.environ | environment, stdout=output, stderr=output)
    try:
        yield psutil.Process(process.pid), _port_of(process, log)
    finally:
        process.terminate()
        process.wait(timeout=30)


def _port_of(process: "subprocess.Popen[bytes]", log: Path) -> int:
    ends_at = time.monotonic() + 120
    while time.monotonic() < ends_at and process.poll() is None:
        if found := LISTENING.search(log.read_text()):
            return int(found[1])
        time.sleep(0.05)
    raise RuntimeError(f"no server started:\n{log.read_text()[-2000:]}")


def load(
    port: int,
    body: Path,
    *,
    path: str,
    seconds: float,
    connections: int,
    rate: float | None,
    key: str | None = None,
) -> dict[str, Any]:
    options = ["--port", str(port), "--path", path, "--body", str(body)]
    options += ["--seconds", str(seconds), "--connections", str(connections)]
    options += ["--rate", str(rate)] if rate else []
    options += ["--key", key] if key is not None else []
    command = [sys.executable, "-m", "bench.http_load", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def measured(name: str, process: psutil.Process, port: int, body: Path, **options: Any) -> tuple[dict[str, Any], float]:
    """A load report, and the process's CPU time per request in microseconds."""
    load(port, body, **options | {"seconds": 1.0})  # warm
    before = cpu_seconds(process)
    report = load(port, body, **options)
    cpu = (cpu_seconds(process) - before) / max(report["num_answers"], 1) * 1e6
    print(
        f"{name:34} {report['per_second']:8.0f}/s   p50 {report['p50_ms']:6.1f}   p90 {report['p90_ms']:6.1f}   "
        f"p99 {report['p99_ms']:6.1f} ms   CPU {cpu:5.0f} us each   {report['statuses']}",
        flush=True,
    )
    return report, cpu


def microseconds(function: Callable[[], object], *, repeats: int = NUM_REPEATS, per_call: int = 1) -> float:
    """CPU time of this process per job in microseconds, without the cost of the first calls."""
    for _ in range(repeats // 10):
        function()
    started = time.process_time()
    for _ in range(repeats):
        function()
    return (time.process_time() - started) / repeats / per_call * 1e6


def make_new_job(body: JobBody, view: ModelView) -> NewJob:
    request, options = body.to_request(), body.to_options(None)
    prompt_token_ids = view.encode(request)
    resolved = resolve_params(request, view, len(prompt_token_ids))
    assert resolved.max_tokens is not None
    assert resolved.seed is not None
    return NewJob(
        id=new_id(),
        tenant_id=DEFAULT_TENANT_ID,
        request=request.model_copy(update={"params": resolved}),
        prompt_token_ids=prompt_token_ids,
        model_revision=view.revision,
        max_tokens=resolved.max_tokens,
        seed=resolved.seed,
        max_failures=3,
        result_ttl_seconds=86_400,
        request_hash=request_hash(request, options),
        metadata=options.metadata,
    )


def bench_sql(database_url: str, new_job: NewJob) -> tuple[float, float]:
    """Run the accept statement in groups over one connection, without HTTP. Returns jobs/s and the client's CPU
    microseconds per job."""
    database = open_database(database_url)
    sessions = session_factory(database)

    def accept_group() -> None:
        with sessions.begin() as session:
            group = [replace(new_job, id=new_id()) for _ in range(GROUP)]
            job_accept.accept(session, group, max_queued_jobs=10**9)

    started = time.perf_counter()
    cpu = microseconds(accept_group, repeats=50, per_call=GROUP)
    rate = 55 * GROUP / (time.perf_counter() - started)
    database.dispose()
    print(f"{f'ceiling: accept in groups of {GROUP}':34} {rate:8.0f}/s{'':44}CPU {cpu:5.0f} us each", flush=True)
    return rate, cpu


def bench_stages(content: bytes, view: ModelView, new_job: NewJob) -> dict[str, float]:
    body = parse_model(content, JobBody)
    request, options = body.to_request(), body.to_options(None)
    ids, queue, now = list(new_job.prompt_token_ids), ModelQueue(new_job.request.model_id), datetime.now(UTC)
    ready = ReadyRequest(prepare_generation(request, view, ids), new_job.fingerprint, None)
    asked, settings = new_job.request_hash, get_settings()

    def place() -> QueueView:
        return queue.place(queue.joining(DEFAULT_TENANT_ID, Load(1, 2, 3), new_job.max_output_tokens))

    placed = place()
    steps: dict[str, Callable[[], object]] = {
        "JSON and validation": lambda: parse_model(content, JobBody).to_request(),
        "template and tokenizer": lambda: view.encode(request),
        "defaults and bounds": lambda: prepare_generation(request, view, ids),
        "hashes": lambda: (request_hash(request, options), fingerprint(view.revision, ids, request)),
        "the job": lambda: make_job(DEFAULT_TENANT_ID, options, view, ready, settings=settings, asked=asked),
        "log line and counters": lambda: job_log.accepted(new_job),
        "place in the queue": place,
        "view of the answer": lambda: orjson.dumps(new_job_view(new_job, now, placed)),
    }
    with logging_to_nowhere():
        return {name: microseconds(step) for name, step in steps.items()}


@contextmanager
def logging_to_nowhere() -> Iterator[None]:
    with open(os.devnull, "w") as nothing:
        with redirect_stderr(nothing):
            configure_logging("INFO", "json")
        yield
    configure_logging("WARNING", "text")


def print_split(total: float, stages: dict[str, float]) -> dict[str, float]:
    split = stages | {"other: cold caches, event loop, groups, dispatch": total - sum(stages.values())}
    print(f"\nCPU of the API process per job: {total:.0f} us, of which, each alone over and over, so with warm caches,")
    for name, value in split.items():
        print(f"  {name:46} {value:5.0f} us  {value / total:4.0%}")
    return {name: round(value, 1) for name, value in split.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1500, help="of the open loop")
    given = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    with tempfile.TemporaryDirectory(prefix="celeriac-bench-", ignore_cleanup_errors=True) as folder:
        figures = run(Path(folder), given)
    print(json.dumps({"bench": "accept", **figures}))


def run(folder: Path, given: argparse.Namespace) -> dict[str, object]:
    content, body_file = request_body(), folder / "body.json"
    body_file.write_bytes(content)
    view = load_model_view(Catalog.load(ROOT / "models.toml").get("celeriac-mini"))
    new_job = make_new_job(parse_model(content, JobBody), view)
    num_tokens = len(new_job.prompt_token_ids)
    print(f"body {len(content)} bytes, {num_tokens} prompt tokens, {given.connections} connections\n")
    with EmbeddedPostgres(folder / "postgres") as postgres, EmbeddedRedis(folder / "redis") as redis:
        migrate(postgres.url)
        environment = {
            "CELERIAC_DATABASE_URL": postgres.url,
            "CELERIAC_REDIS_URL": redis.url,
            "CELERIAC_MAX_QUEUED_JOBS": str(10**8),
            "CELERIAC_PORT": "0",
        }
        generator, http_cpu = bench_ceilings(folder, environment, body_file, given)
        sql_rate, sql_cpu = bench_sql(postgres.url, new_job)
        closed, open_, total_cpu = bench_api(folder, environment, body_file, given)
    stages = {"HTTP, routing, key": http_cpu, **bench_stages(content, view, new_job), "SQL client": sql_cpu}
    split = print_split(total_cpu, stages)
    return {"closed": closed, "open": open_, "sql_per_second": sql_rate, "generator": generator, "cpu_us": split}


def bench_ceilings(
    folder: Path, environment: dict[str, str], body: Path, given: argparse.Namespace
) -> tuple[dict[str, Any], float]:
    """Reports of the generator's own limit, and the CPU time of a request that does nothing."""
    options = {"seconds": 3.0, "connections": given.connections, "rate": None}
    trivial = [sys.executable, "-m", "bench.trivial_app"]
    with server(trivial, environment, folder / "trivial.log") as (process, port):
        generator, _ = measured("ceiling: generator, bare ASGI", process, port, body, path="/bare", **options)
        measured("ceiling: FastAPI alone", process, port, body, path="/fastapi", **options)
        _, cpu = measured("ceiling: our layers, nothing behind", process, port, body, path="/v1/jobs", **options)
    return generator, cpu


def bench_api(
    folder: Path, environment: dict[str, str], body: Path, given: argparse.Namespace
) -> tuple[dict[str, Any], dict[str, Any], float]:
    """Reports of the closed and the open loop, and the CPU time of an accepted job."""
    options = {"path": "/v1/jobs", "seconds": given.seconds, "connections": given.connections}
    serve = "from api.server import serve; from settings import get_settings; serve(get_settings())"
    with server([sys.executable, "-c", serve], environment, folder / "api.log") as (process, port):
        closed, cpu = measured("accept, closed loop", process, port, body, rate=None, **options)
        name = f"accept, open loop at {given.rate:.0f}/s"
        open_, _ = measured(name, process, port, body, rate=given.rate, **options)
    return closed, open_, cpu


if __name__ == "__main__":
    main()
