"""Measures what the system adds to the time to first token when idle: `python -m bench.time_to_first_token`.

For each model, first comes the ceiling: an engine process fed directly. Then the same jobs go singly through HTTP,
PostgreSQL, Redis, the Celery worker, the committed chunk and the event stream, from the first byte of the POST to the
first output.delta. Prints both, the difference and its parts, then one JSON line.
"""

import argparse
import http.client
import json
import os
import platform
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from bench.accept import server
from domain.catalog import Catalog, ModelSpec
from domain.jobs import external_id, new_id
from domain.requests import GenerationRequest, SamplingParams
from gpu_worker.engine_process.frames import AddJob, StepDone
from gpu_worker.engine_process.supervisor import EngineProcess
from gpu_worker.engine_process.template import EngineTemplate
from local.servers import EmbeddedPostgres, EmbeddedRedis
from settings import ROOT
from storage.database import migrate
from tasks.prepare import resolve_params
from text.models import ModelView, complete, load_model_view

PROMPT = "Once upon a time, a fox"
MAX_TOKENS = 4
PAUSE_SECONDS = 0.05  # between two jobs, so that the system is idle again
START_SECONDS = 120

MODELS = f"""
[[models]]
id = "fake"
path = "none"
backend = "fake"
max_model_len = 1024
fake = {{ step_seconds = 0.005 }}

[[models]]
id = "celeriac-mini"
path = "{ROOT}/models/celeriac-mini"
max_model_len = 1024
"""


class Samples:
    """Measurements of one quantity in milliseconds."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.values: list[float] = []

    def add(self, seconds: float) -> None:
        self.values.append(seconds * 1000)

    @property
    def p50(self) -> float:
        return statistics.median(self.values)

    def show(self) -> None:
        p90, p99 = (sorted(self.values)[int(len(self.values) * share)] for share in (0.9, 0.99))
        print(f"  {self.name:44} p50 {self.p50:7.2f}   p90 {p90:7.2f}   p99 {p99:7.2f} ms", flush=True)


def engine_alone(spec: ModelSpec, num_jobs: int) -> Samples:
    samples = Samples("ceiling: engine process alone")
    view = load_model_view(spec)
    template = EngineTemplate(spec, heartbeat_seconds=10)
    engine = EngineProcess(template, heartbeat_seconds=10.0)
    try:
        while engine.ready is None:
            select.select([engine.frame_socket], [], [], 1)
            engine.receive()
            assert not engine.has_ended(), "the engine did not start"
        for _ in range(num_jobs):
            samples.add(_first_token_seconds(engine, view))
            time.sleep(PAUSE_SECONDS)
    finally:
        engine.kill("it has been measured")
        engine.end()
        template.close()
    return samples


def _first_token_seconds(engine: EngineProcess, view: ModelView) -> float:
    """Seconds until the first output. Returns when the job is over."""
    request = GenerationRequest(model=view.spec.id, prompt=PROMPT, params=SamplingParams(max_tokens=MAX_TOKENS, seed=1))
    token_ids = view.encode(request)
    params = resolve_params(request, view, len(token_ids))
    command = AddJob(
        job_id=external_id(new_id()),
        attempt=1,
        prompt_token_ids=token_ids,
        params=params.model_dump(mode="json"),
        max_tokens=MAX_TOKENS,
        seed=1,
        priority=0,
        cache_salt=external_id(new_id()),  # as if every job came from another tenant, so that no prefix is shared
        committed_token_ids=[[]],
        num_emitted_chars=[0],
        finished_indexes=[],
    )
    started, first = time.perf_counter(), 0.0
    engine.send(command)
    while True:
        select.select([engine.frame_socket], [], [], 30)
        steps = [report for report in engine.receive() if isinstance(report, StepDone)]
        outputs = [output for step in steps for output in step.outputs]
        if outputs and not first:
            first = time.perf_counter() - started
        if any(output.finish_reason for output in outputs):
            return first


@contextmanager
def worker(model: str, environment: dict[str, str], log: Path) -> Iterator[None]:
    command = [sys.executable, "-m", "celery", "-A", "gpu_worker.app", "worker"]
    environment = os.environ | environment | {"CELERIAC_WORKER_MODEL": model}
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
    try:
        yield
    finally:
        process.terminate()
        process.wait(timeout=60)


def through_the_system(model: str, port: int, num_jobs: int) -> list[Samples]:
    """[total, POST, accept to claim, claim to the client]."""
    total, post, queue, rest = (
        Samples(name)
        for name in (
            "through the system",
            "  of that: POST until answered",
            "  of that: accepted until claimed (SQL's clock)",
            "  of that: the rest, engine included",
        )
    )
    submitting = http.client.HTTPConnection("127.0.0.1", port)
    for number in range(num_jobs + 3):
        started = time.perf_counter()
        job_id = _submit(submitting, model)
        posted = time.perf_counter()
        _read_until_first_delta(port, job_id)
        ended = time.perf_counter()
        job = _ask(submitting, f"/v1/jobs/{job_id}?wait=10")
        time.sleep(PAUSE_SECONDS)
        if number < 3:
            continue  # connections, caches, prepared statements
        waited = (_at(job["started_at"]) - _at(job["created_at"])).total_seconds()
        total.add(ended - started)
        post.add(posted - started)
        queue.add(waited)
        rest.add(ended - posted - waited)
    return [total, post, queue, rest]


def _submit(connection: http.client.HTTPConnection, model: str) -> str:
    body = json.dumps({"model": model, "prompt": PROMPT, "params": {"max_tokens": MAX_TOKENS, "seed": 1}})
    connection.request("POST", "/v1/jobs", body, {"content-type": "application/json"})
    response = connection.getresponse()
    answer = json.loads(response.read())
    assert response.status == 202, answer
    return str(answer["id"])


def _read_until_first_delta(port: int, job_id: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", f"/v1/jobs/{job_id}/events")
    response = connection.getresponse()
    while line := response.readline():
        if line.startswith(b"event: output.delta"):
            break
    connection.close()


def _ask(connection: http.client.HTTPConnection, path: str) -> dict[str, Any]:
    connection.request("GET", path)
    return dict(json.loads(connection.getresponse().read()))


def _at(text: str) -> datetime:
    return datetime.fromisoformat(text)


def wait_for_worker(port: int, log: Path) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    ends_at = time.monotonic() + START_SECONDS
    while _ask(connection, "/health")["workers"] == 0:
        assert time.monotonic() < ends_at, f"no worker started:\n{log.read_text()[-2000:]}"
        time.sleep(0.2)


def bench(spec: ModelSpec, folder: Path, environment: dict[str, str], num_jobs: int) -> dict[str, object]:
    print(f"\n{spec.id}, {num_jobs} jobs one at a time")
    alone = engine_alone(spec, num_jobs)
    alone.show()
    serve = "from api.server import serve; from settings import get_settings; serve(get_settings())"
    log = folder / f"{spec.id}.log"
    with (
        server([sys.executable, "-c", serve], environment, folder / "api.log") as (_, port),
        worker(spec.id, environment, log),
    ):
        wait_for_worker(port, log)
        parts = through_the_system(spec.id, port, num_jobs)
    for samples in parts:
        samples.show()
    added = parts[0].p50 - alone.p50
    print(f"  added: p50 {added:.2f} ms", flush=True)
    figures: dict[str, object] = {"added_p50_ms": round(added, 2), "engine_p50_ms": round(alone.p50, 2)}
    return figures | {"system_p50_ms": round(parts[0].p50, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=100)
    parser.add_argument("--model", choices=["fake", "celeriac-mini"], action="append")
    given = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    with tempfile.TemporaryDirectory(prefix="celeriac-bench-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        models_file = folder / "models.toml"
        models_file.write_text(MODELS)
        catalog = Catalog.load(models_file)
        with EmbeddedPostgres(folder / "postgres") as postgres, EmbeddedRedis(folder / "redis") as redis:
            migrate(postgres.url)
            environment = {
                "CELERIAC_DATABASE_URL": postgres.url,
                "CELERIAC_REDIS_URL": redis.url,
                "CELERIAC_MODELS_FILE": str(models_file),
                "CELERIAC_PORT": "0",
            }
            figures = {
                model: bench(complete(catalog.get(model)), folder, environment, given.jobs)
                for model in given.model or ["fake", "celeriac-mini"]
            }
    print(json.dumps({"bench": "time_to_first_token", **figures}))


if __name__ == "__main__":
    main()
