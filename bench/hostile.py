"""Measures one tenant's operations before, during and after the attacks of another: `python -m bench.hostile`.

One API process with keys, PostgreSQL, Redis and maintenance, all embedded. The attacker has one ordinary key, and so
has the other tenant. Prints a line for each operation and phase, then one JSON line. No answer may be a 5xx, other than
a 503 with Retry-After, and every operation of the other tenant must succeed. Two figures of each phase tell the
system's part from the machine's: the ceiling, which is a request that does nothing, and the CPU time of each process
for a round of operations. `--control 30` is the same run with thirty seconds without attacks in their place.
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psycopg

from bench.accept import server
from bench.hostile_kinds import KINDS
from bench.hostile_requests import ATTACKS, OPERATIONS, PATIENCE_SECONDS, attack
from bench.request_cost import MODELS
from bench.tenants import cpu_seconds_of
from local.servers import EmbeddedPostgres, EmbeddedRedis
from storage import tenants
from storage.database import migrate, open_database, session_factory

ROUNDS = 20  # of each operation, before and after
Seconds = dict[str, list[float]]

SETTLE_SECONDS = 5.0  # after the attack, in which what it had begun may end: clients hung up, uploads cut


@dataclass(frozen=True, slots=True)
class Target:
    """What is attacked: its URL, the keys of two tenants, and its processes by name."""

    url: str
    attacker_key: str
    other_key: str
    pids: dict[str, int]
    database_url: str

    def client(self, key: str, **options: Any) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.url, headers={"authorization": f"Bearer {key}"}, **options)

    def num_queued(self) -> int:
        """Jobs of both. Nothing runs them, so they become more in a run of any kind."""
        with psycopg.connect(self.database_url) as connection:
            [(counted,)] = connection.execute("SELECT count(*) FROM jobs WHERE status = 'queued'").fetchall()
        return int(counted)

    def cpu_seconds(self) -> dict[str, float]:
        return {name: cpu_seconds_of(pid) for name, pid in self.pids.items()}


@contextmanager
def api_with_keys(folder: Path) -> Iterator[Target]:
    (folder / "models.toml").write_text(MODELS)
    with EmbeddedPostgres(folder / "postgres") as postgres, EmbeddedRedis(folder / "redis") as redis:
        migrate(postgres.url)
        database = open_database(postgres.url)
        with session_factory(database).begin() as session:
            owners = [tenants.create_tenant(session, name) for name in ("attacker", "other")]
            keys = [tenants.create_key(session, owner.id) for owner in owners]
        database.dispose()
        environment = {
            "CELERIAC_DATABASE_URL": postgres.url,
            "CELERIAC_REDIS_URL": redis.url,
            "CELERIAC_MODELS_FILE": str(folder / "models.toml"),
            "CELERIAC_AUTH": "api_key",
            "CELERIAC_PORT": "0",
        }
        serve = "from api.server import serve; from settings import get_settings; serve(get_settings())"
        maintenance = [sys.executable, "-m", "celeriac", "maintenance"]
        with (
            server([sys.executable, "-c", serve], environment, folder / "api.log") as (api, port),
            server(maintenance, environment, folder / "maintenance.log") as (janitor, _),
        ):
            pids = {"api": api.pid, "maintenance": janitor.pid, "postgres": postgres.pid or 0}
            yield Target(f"http://127.0.0.1:{port}", keys[0], keys[1], pids, postgres.url_of(postgres.database))


async def nothing(client: httpx.AsyncClient) -> None:
    (await client.get("/health/live")).raise_for_status()


async def work(client: httpx.AsyncClient, until: asyncio.Event | None, seconds: Seconds) -> None:
    """Every operation in turn: ROUNDS times, or until the event is set."""
    num_rounds = 0
    while not until.is_set() if until else num_rounds < ROUNDS:
        for operation in (nothing, *OPERATIONS):
            began_at = time.perf_counter()
            await operation(client)
            seconds.setdefault(operation.__name__, []).append(time.perf_counter() - began_at)
        num_rounds += 1


async def measure(target: Target, given: argparse.Namespace) -> dict[str, object]:
    phases: dict[str, Seconds] = {"before": {}, "during": {}, "after": {}}
    cpu: dict[str, dict[str, float]] = {}
    queued: dict[str, int] = {}

    async def rounds(phase: str) -> None:
        before = target.cpu_seconds()
        await work(other, None, phases[phase])
        queued[phase] = target.num_queued()
        cpu[phase] = {
            name: round(1000 * (now - before[name]) / ROUNDS, 1) for name, now in target.cpu_seconds().items()
        }

    async with target.client(target.other_key, timeout=60) as other:
        await work(other, None, {})
        await rounds("before")
        is_over = asyncio.Event()
        working = asyncio.create_task(work(other, is_over, phases["during"]))
        answers = await attack_elsewhere(target, given) if given.control is None else await pause(given.control)
        is_over.set()
        await working
        await asyncio.sleep(SETTLE_SECONDS)
        await rounds("after")
    return {
        **answers,
        "num_queued": queued,
        "cpu_ms_per_round": cpu,
        "ms": {name: _medians(of) for name, of in phases.items()},
    }


async def pause(seconds: float) -> dict[str, Any]:
    await asyncio.sleep(seconds)
    return {"statuses": {}, "complaints": []}


async def attack_elsewhere(target: Target, given: argparse.Namespace) -> dict[str, Any]:
    """In a process of its own: making the requests is work, too, which must not delay those that are measured."""
    arguments = ["--requests", given.requests, "--at-once", given.at_once, "--seed", given.seed, "--attack", target.url]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "bench.hostile",
        *map(str, arguments),
        env=os.environ | {"CELERIAC_API_KEY": target.attacker_key},
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await process.communicate()
    answers: dict[str, Any] = json.loads(output.splitlines()[-1])
    return answers


async def attack_here(given: argparse.Namespace) -> dict[str, object]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=20)
    headers = {"authorization": f"Bearer {os.environ['CELERIAC_API_KEY']}"}
    async with httpx.AsyncClient(
        base_url=given.attack, headers=headers, timeout=PATIENCE_SECONDS, limits=limits
    ) as attacker:
        statuses, complaints = await attack(
            attacker,
            [*ATTACKS, *KINDS.items()],
            num_requests=given.requests,
            num_at_once=given.at_once,
            seed=given.seed,
        )
    return {"statuses": statuses, "complaints": complaints}


def _medians(seconds: Seconds) -> dict[str, list[float]]:
    """Median and maximum in milliseconds."""
    return {
        name: [round(1000 * statistics.median(times), 1), round(1000 * max(times), 1)]
        for name, times in seconds.items()
    }


def show(figures: dict[str, Any]) -> None:
    for phase, medians in figures["ms"].items():
        for name, (median, maximum) in medians.items():
            print(f"{phase:8} {name:12} p50 {median:8.1f} ms   max {maximum:8.1f} ms")
    print(f"answers to the attacker: {figures['statuses']}; complaints: {figures['complaints'] or 'none'}")
    print(f"jobs queued at the end of each: {figures['num_queued']}")
    print(f"CPU time of a round in ms: {figures['cpu_ms_per_round']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1_300, help="attacks, some of which are many requests")
    parser.add_argument("--at-once", type=int, default=48)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--control", type=float, metavar="SECONDS", help="no attacks, but these seconds without any")
    parser.add_argument("--attack", metavar="URL", help="only attack, with the key in CELERIAC_API_KEY")
    given = parser.parse_args()
    if given.attack:
        print(json.dumps(asyncio.run(attack_here(given))))
        return
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    with tempfile.TemporaryDirectory(prefix="celeriac-bench-", ignore_cleanup_errors=True) as folder:
        with api_with_keys(Path(folder)) as target:
            figures = asyncio.run(measure(target, given))
        errors = [line for line in (Path(folder) / "api.log").read_text().splitlines() if "request failed" in line]
    show(figures)
    print(json.dumps({"bench": "hostile", **figures, "num_errors_logged": len(errors), "errors": errors[:3]}))


if __name__ == "__main__":
    main()
