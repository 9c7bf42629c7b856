"""Measures one tenant's operations before, during and after the attacks of another: `python -m bench.hostile`.

One API process with keys, PostgreSQL, Redis and maintenance, all embedded. The attacker has one ordinary key, and so
has the other tenant. Prints a line for each operation and phase, then one JSON line. No answer may be a 5xx, other than
a 503 with Retry-After, and every operation of the other tenant must succeed.
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
from pathlib import Path

import httpx

from bench.accept import server
from bench.hostile_requests import OPERATIONS, PATIENCE_SECONDS, attack
from bench.request_cost import MODELS
from local.servers import EmbeddedPostgres, EmbeddedRedis
from storage import tenants
from storage.database import migrate, open_database, session_factory

ROUNDS = 20  # of each operation, before and after
Seconds = dict[str, list[float]]


@contextmanager
def api_with_keys(folder: Path) -> Iterator[tuple[str, str, str]]:
    """Its URL and the keys of two tenants."""
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
            server([sys.executable, "-c", serve], environment, folder / "api.log") as (_, port),
            server(maintenance, environment, folder / "maintenance.log"),
        ):
            yield f"http://127.0.0.1:{port}", keys[0], keys[1]


async def work(client: httpx.AsyncClient, until: asyncio.Event | None, seconds: Seconds) -> None:
    """Every operation in turn: ROUNDS times, or until the event is set."""
    num_rounds = 0
    while not until.is_set() if until else num_rounds < ROUNDS:
        for operation in OPERATIONS:
            began_at = time.perf_counter()
            await operation(client)
            seconds.setdefault(operation.__name__, []).append(time.perf_counter() - began_at)
        num_rounds += 1


async def measure(url: str, keys: tuple[str, str], given: argparse.Namespace) -> dict[str, object]:
    phases: dict[str, Seconds] = {"before": {}, "during": {}, "after": {}}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=20)
    attacker = httpx.AsyncClient(
        base_url=url, headers={"authorization": f"Bearer {keys[0]}"}, timeout=PATIENCE_SECONDS, limits=limits
    )
    other = httpx.AsyncClient(base_url=url, headers={"authorization": f"Bearer {keys[1]}"}, timeout=60)
    async with attacker, other:
        await work(other, None, {})
        await work(other, None, phases["before"])
        is_over = asyncio.Event()
        working = asyncio.create_task(work(other, is_over, phases["during"]))
        statuses, complaints = await attack(
            attacker, num_requests=given.requests, num_at_once=given.at_once, seed=given.seed
        )
        is_over.set()
        await working
        await work(other, None, phases["after"])
    return {"statuses": statuses, "complaints": complaints, "ms": {name: _medians(of) for name, of in phases.items()}}


def _medians(seconds: Seconds) -> dict[str, list[float]]:
    """Median and maximum in milliseconds."""
    return {
        name: [round(1000 * statistics.median(times), 1), round(1000 * max(times), 1)]
        for name, times in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1_300, help="attacks, some of which are many requests")
    parser.add_argument("--at-once", type=int, default=48)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    with tempfile.TemporaryDirectory(prefix="celeriac-bench-", ignore_cleanup_errors=True) as folder:
        with api_with_keys(Path(folder)) as (url, *keys):
            figures = asyncio.run(measure(url, (keys[0], keys[1]), given))
        errors = [line for line in (Path(folder) / "api.log").read_text().splitlines() if "request failed" in line]
    for phase, medians in figures["ms"].items():  # type: ignore[attr-defined]
        for name, (median, maximum) in medians.items():
            print(f"{phase:8} {name:12} p50 {median:8.1f} ms   max {maximum:8.1f} ms")
    print(
        f"answers to the attacker: {figures['statuses']}; complaints: {figures['complaints'] or 'none'}; {errors[:3]}"
    )
    print(json.dumps({"bench": "hostile", **figures, "num_errors_logged": len(errors)}))


if __name__ == "__main__":
    main()
