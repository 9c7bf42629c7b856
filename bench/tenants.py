"""The whole system with several tenants, for benches of how they share it: processes, keys, and clients that measure.

The engine is the fake one, so what is measured is the system and not a model: a worker with NUM_SLOTS slots whose every
step takes STEP_SECONDS.
"""

import asyncio
import itertools
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import psutil

from domain.access import Scope
from domain.jobs import parse_id
from settings import ROOT
from storage import tenants
from storage.database import open_database, session_factory
from tests.chaos.plant import Plant
from tests.waiting import wait_until

MODEL = "fake"
SECOND_MODEL = "second"  # like it, where a worker is given both
UNSERVED_MODEL = "celeriac-mini"  # its grammars are compiled, its jobs wait: the fake one has no vocabulary
NUM_SLOTS = 4
STEP_SECONDS = 0.02
PATIENCE_SECONDS = 120.0

_FAKE = """
[[models]]
id = "{id}"
path = "none"
backend = "fake"
max_model_len = 1024
max_num_seqs = {num_slots}
fake = {{ step_seconds = {step_seconds} }}
"""

MODELS = f"""
{"".join(_FAKE.format(id=id, num_slots=NUM_SLOTS, step_seconds=STEP_SECONDS) for id in (MODEL, SECOND_MODEL))}
[[models]]
id = "{UNSERVED_MODEL}"
path = "{ROOT}/models/celeriac-mini"
max_model_len = 1024
"""

_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class BenchTenant:
    """A tenant and its only key."""

    id: UUID
    key: str
    url: str

    def client(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        headers = {"authorization": f"Bearer {self.key}"}
        return httpx.AsyncClient(base_url=self.url, headers=headers, timeout=PATIENCE_SECONDS, limits=limits)


@dataclass(frozen=True, slots=True)
class TenantSystem:
    """A running system."""

    plant: Plant
    tenants: Mapping[str, BenchTenant]

    def rows(self, statement: str, *parameters: Any) -> list[Any]:
        with self.plant.connect() as connection:
            return connection.execute(statement.encode(), parameters).fetchall()

    def tokens_by_tenant(self) -> dict[UUID, int]:
        """The tokens that each has received so far, of running jobs, too: of the prompts that were computed, and of the
        output."""
        received = "sum(num_prompt_tokens + num_committed_tokens) FILTER (WHERE first_token_at IS NOT NULL)"
        return dict(self.rows(f"SELECT tenant_id, coalesce({received}, 0)::int FROM jobs GROUP BY tenant_id"))

    def num_output_tokens(self) -> int:
        """That all have received so far."""
        [(num_tokens,)] = self.rows("SELECT coalesce(sum(num_committed_tokens), 0)::int FROM jobs")
        return int(num_tokens)

    def admin_key(self, name: str) -> str:
        """A new key of this tenant that may do everything."""
        database = open_database(self.plant.postgres.url)
        try:
            with session_factory(database).begin() as session:
                return tenants.create_key(session, self.tenants[name].id, scopes=list(Scope))
        finally:
            database.dispose()

    def memory_mib(self) -> dict[str, float]:
        """Resident memory of each part with its children, and of Redis."""
        pids = {part.name: [part.pid] for part in self.plant.parts}
        pids["redis"] = self.plant.pids_of(self.plant.redis)[:1]
        return {name: round(sum(map(_resident_bytes, own)) / 2**20, 1) for name, own in pids.items()}

    def cpu_seconds(self) -> dict[str, float]:
        """Of each part with its children, and of the servers."""
        pids = {part.name: [part.pid] for part in self.plant.parts}
        servers = {"redis": self.plant.redis, "postgres": self.plant.postgres}
        pids |= {name: self.plant.pids_of(server)[:1] for name, server in servers.items()}
        return {name: sum(map(cpu_seconds_of, own)) for name, own in pids.items()}


def _family(pid: int) -> Iterator[psutil.Process]:
    try:
        process = psutil.Process(pid)
        yield process
        yield from process.children(recursive=True)
    except psutil.NoSuchProcess:
        return


def _resident_bytes(pid: int) -> int:
    total = 0
    for process in _family(pid):
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def cpu_seconds_of(pid: int) -> float:
    """Of a process and its children, so far."""
    total = 0.0
    for process in _family(pid):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


@contextmanager
def running_system(
    folder: Path,
    weights: Mapping[str, float],
    *,
    settings: Mapping[str, object] | None = None,
    models: str = MODELS,
    served: Sequence[str] = (MODEL,),
) -> Iterator[TenantSystem]:
    """PostgreSQL, Redis, an API process, maintenance and a worker of the `served` models, with a tenant for each of
    `weights`."""
    settings = {"auth": "api_key", "log_level": "WARNING"} | dict(settings or {})
    with Plant(folder, models=models, worker_models={"gpu-1": ",".join(served)}, settings=settings) as plant:
        plant.start_servers()
        database = open_database(plant.postgres.url)
        with session_factory(database).begin() as session:
            made = {name: tenants.create_tenant(session, name, weight=weight).id for name, weight in weights.items()}
            keys = {name: tenants.create_key(session, tenant_id) for name, tenant_id in made.items()}
        database.dispose()
        plant.start_parts()
        system = TenantSystem(plant, {name: BenchTenant(made[name], keys[name], plant.api_urls[0]) for name in weights})
        wait_until(lambda: _is_ready(system), "the system has started", seconds=120, pause_seconds=0.2)
        yield system


def _is_ready(system: TenantSystem) -> bool:
    [(num_workers,)] = system.rows("SELECT count(*) FROM workers WHERE state = 'ready'")
    try:
        is_up = httpx.get(f"{system.plant.api_urls[0]}/health/ready", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False
    return is_up and int(num_workers) > 0


def job_body(num_tokens: int, *, model: str = MODEL, priority: int = 0, **params: object) -> dict[str, object]:
    """A prompt that no other job has had."""
    prompt = f"job {next(_numbers)} of {time.time_ns()}"
    given = {"max_tokens": num_tokens, **params}
    return {"model": model, "prompt": prompt, "priority": priority, "params": given}


async def submit(client: httpx.AsyncClient, num_tokens: int, **options: Any) -> str:
    answer = await client.post("/v1/jobs", json=job_body(num_tokens, **options))
    if answer.status_code != 202:
        raise RuntimeError(f"the job was not accepted: {answer.status_code} {answer.text}")
    return str(answer.json()["id"])


async def submit_many(client: httpx.AsyncClient, num_jobs: int, num_tokens: int, **options: Any) -> list[str]:
    """Sixteen at a time."""
    job_ids: list[str] = []
    while num_jobs > len(job_ids):
        room = min(16, num_jobs - len(job_ids))
        job_ids += await asyncio.gather(*(submit(client, num_tokens, **options) for _ in range(room)))
    return job_ids


async def wait_for_ends(client: httpx.AsyncClient, job_ids: Iterable[str]) -> list[dict[str, Any]]:
    """The ended jobs."""

    async def wait(job_id: str) -> dict[str, Any]:
        while True:
            answer = await client.get(f"/v1/jobs/{job_id}", params={"wait": 60})
            job: dict[str, Any] = answer.raise_for_status().json()
            if job["finished_at"] is not None:
                return job

    return list(await asyncio.gather(*map(wait, job_ids)))


def waits(jobs: Iterable[Mapping[str, Any]]) -> list[float]:
    """Seconds between the acceptance and the first claim of each."""
    return [_seconds(job["created_at"], job["started_at"]) for job in jobs]


def _seconds(began_at: str, ended_at: str) -> float:
    return (datetime.fromisoformat(ended_at) - datetime.fromisoformat(began_at)).total_seconds()


async def cancel_all(client: httpx.AsyncClient, job_ids: Sequence[str]) -> None:
    """The newest first, as cancelling a running one makes room for the next. Sixteen at a time."""
    waiting = list(job_ids)
    while waiting:
        some, waiting = waiting[-16:], waiting[:-16]
        await asyncio.gather(*(client.post(f"/v1/jobs/{job_id}/cancel") for job_id in some))


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


async def timed(operation: Callable[[], Any]) -> float:
    """Seconds that the awaited operation took."""
    began_at = time.perf_counter()
    await operation()
    return time.perf_counter() - began_at


def parsed(job_ids: Iterable[str]) -> list[UUID]:
    return [parse_id(job_id) for job_id in job_ids]


def machine() -> str:
    load = os.getloadavg()[0]
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {load:.1f}"
