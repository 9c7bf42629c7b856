"""Measures what the system adds to the time to first token when idle: `python -m bench.time_to_first_token`.

For each model, first comes the ceiling: an engine process fed directly. Then the same jobs go singly through HTTP,
PostgreSQL, Redis, the Celery worker, the committed chunk and the event stream, from the first byte of the POST to the
first output.delta. Prints both, the difference and its parts, then one JSON line.

`--route` takes another way in. `--against FOLDER` runs another checkout, with its own .venv, beside this one, and jobs
of both by turns: what else the machine does, meets both alike.
"""

import argparse
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
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path

from bench.accept import server
from bench.first_token_routes import MAX_TOKENS, PROMPT, ROUTES, ask
from domain.catalog import Catalog, ModelSpec
from domain.jobs import external_id, new_id
from domain.requests import GenerationRequest, SamplingParams
from gpu_worker.engine_process.frames import AddJob, StepDone
from gpu_worker.engine_process.supervisor import EngineProcess
from gpu_worker.engine_process.template import EngineTemplate
from local.servers import EmbeddedPostgres, EmbeddedRedis
from settings import ROOT
from tasks.prepare import resolve_params
from text.models import ModelView, complete, load_model_view

PAUSE_SECONDS = 0.05  # between two jobs, so that the system is idle again
NUM_WARM = 8  # jobs that are not measured: connections, caches, and statements that a client prepares after some uses
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
def worker(model: str, environment: dict[str, str], log: Path, root: Path = ROOT) -> Iterator[None]:
    command = [_python_of(root), "-m", "celery", "-A", "gpu_worker.app", "worker"]
    environment = os.environ | environment | {"CELERIAC_WORKER_MODEL": model}
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=root, env=environment, stdout=output, stderr=output)
    try:
        yield
    finally:
        process.terminate()
        process.wait(timeout=60)


def wait_for_worker(port: int, log: Path) -> None:
    ends_at = time.monotonic() + START_SECONDS
    while ask(port, "/health")["workers"] == 0:
        assert time.monotonic() < ends_at, f"no worker started:\n{log.read_text()[-2000:]}"
        time.sleep(0.2)


def _python_of(root: Path) -> str:
    return sys.executable if root == ROOT else str(root / ".venv/bin/python")


@contextmanager
def stack(root: Path, model: str, models_file: Path, folder: Path) -> Iterator[int]:
    """A system of its own, from this checkout or another one, with a worker that is ready. Yields the API's port."""
    folder.mkdir()
    with EmbeddedPostgres(folder / "postgres") as postgres, EmbeddedRedis(folder / "redis") as redis:
        environment = {
            "CELERIAC_DATABASE_URL": postgres.url,
            "CELERIAC_REDIS_URL": redis.url,
            "CELERIAC_MODELS_FILE": str(models_file),
            "CELERIAC_PORT": "0",
        }
        migration = f"from storage.database import migrate; migrate({postgres.url!r})"
        subprocess.run([_python_of(root), "-c", migration], cwd=root, check=True)
        serve = "from api.server import serve; from settings import get_settings; serve(get_settings())"
        log = folder / "worker.log"
        with (
            server([_python_of(root), "-c", serve], environment, folder / "api.log", root) as (_, port),
            worker(model, environment, log, root),
        ):
            wait_for_worker(port, log)
            yield port


class Parts:
    """What the jobs of one stack took, from the request to the first token."""

    def __init__(self, name: str) -> None:
        self.total = Samples(name)
        self.answered = Samples("  of that: until the answer's head")
        self.queue = Samples("  of that: accepted until claimed (SQL's clock)")
        self.rest = Samples("  of that: the rest, engine included")

    def measure(self, route: str, port: int, model: str) -> None:
        taken = ROUTES[route](port, model)
        job = ask(port, f"/v1/jobs/{taken.job_id}?wait=10")
        waited = (_at(job["started_at"]) - _at(job["created_at"])).total_seconds()
        self.total.add(taken.first)
        self.answered.add(taken.answered)
        self.queue.add(waited)
        self.rest.add(taken.first - taken.answered - waited)

    def show(self) -> None:
        for samples in (self.total, self.answered, self.queue, self.rest):
            samples.show()


def _at(text: str) -> datetime:
    return datetime.fromisoformat(text)


def bench(spec: ModelSpec, folder: Path, given: argparse.Namespace) -> dict[str, object]:
    print(f"\n{spec.id}, {given.jobs} jobs one at a time, by {given.route}")
    alone = engine_alone(spec, given.jobs)
    alone.show()
    roots = {"through the system": ROOT} | ({"through the other one": given.against.resolve()} if given.against else {})
    with ExitStack() as running:
        ports = {
            name: running.enter_context(stack(root, spec.id, folder / "models.toml", folder / f"{spec.id}-{number}"))
            for number, (name, root) in enumerate(roots.items())
        }
        measured = {name: Parts(name) for name in ports}
        for number in range(given.jobs + NUM_WARM):
            for name, port in ports.items():
                (measured[name] if number >= NUM_WARM else Parts(name)).measure(given.route, port, spec.id)
                time.sleep(given.pause)
    figures: dict[str, object] = {"engine_p50_ms": round(alone.p50, 2)}
    for name, parts, prefix in zip(measured, measured.values(), ("", "other_"), strict=False):
        parts.show()
        added = parts.total.p50 - alone.p50
        print(f"  {name}, added: p50 {added:.2f} ms", flush=True)
        figures |= {f"{prefix}added_p50_ms": round(added, 2), f"{prefix}system_p50_ms": round(parts.total.p50, 2)}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=100)
    parser.add_argument("--model", choices=["fake", "celeriac-mini"], action="append")
    parser.add_argument("--route", choices=list(ROUTES), default="jobs")
    parser.add_argument("--against", type=Path, metavar="FOLDER")
    parser.add_argument("--pause", type=float, default=PAUSE_SECONDS, help="seconds between two jobs")
    given = parser.parse_args()
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, load {os.getloadavg()[0]}"
    )
    with tempfile.TemporaryDirectory(prefix="celeriac-bench-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        models_file = folder / "models.toml"
        models_file.write_text(MODELS)
        catalog = Catalog.load(models_file)
        models = given.model or ["fake", "celeriac-mini"]
        figures = {model: bench(complete(catalog.get(model)), folder, given) for model in models}
    print(json.dumps({"bench": "time_to_first_token", "route": given.route, **figures}))


if __name__ == "__main__":
    main()
