"""Measures what accepting a job and answering from the response cache cost, beside FastAPI alone, by turns:
`python -m bench.api_costs`.

In each round every kind of request is sent for a few seconds, after the ceilings with the same body: a bare ASGI
application, and FastAPI with one route and nothing of ours. So ratios hold on a busy machine, too; rates do not. Prints
medians over the rounds, then one JSON line. `with keys` has keys and limits on; the ledger always is. Nothing runs the
accepted jobs. With `--processes 2` two API processes share the load.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import psutil
from sqlalchemy import Engine, text

from bench.accept import cpu_seconds, load, request_body, server
from bench.response_cache import BODIES, MODEL, SERVE, ask_first
from domain.access import Limits
from local.servers import EmbeddedPostgres, EmbeddedRedis
from storage import administration, tenants
from storage.administration import TenantChanges
from storage.database import migrate, open_database, session_factory
from storage.tables import DEFAULT_TENANT_ID, Tenant

MICRO = 1e6
PLENTY = 10**9  # a limit that is measured and never reached


class Server(NamedTuple):
    process: psutil.Process
    port: int


class Kind(NamedTuple):
    name: str
    path: str
    body: Path
    servers: list[Server]
    key: str | None = None


class Measured(NamedTuple):
    """CPU in microseconds for each request."""

    per_second: float
    p50_ms: float
    p99_ms: float
    api_cpu: float
    postgres_cpu: float
    generator_cpu: float
    statuses: dict[str, int]


def postgres_seconds(database: Engine) -> float:
    """CPU time of all of PostgreSQL's processes that serve or have served somebody since its start."""
    with database.connect() as connection:
        pids = list(connection.scalars(text("SELECT pid FROM pg_stat_activity")))
    return sum(cpu_seconds(psutil.Process(pid)) for pid in pids if psutil.pid_exists(pid))


def measure(kind: Kind, database: Engine, *, seconds: float, connections: int) -> Measured:
    options: dict[str, Any] = {"path": kind.path, "rate": None, "key": kind.key}
    options["connections"] = connections // len(kind.servers)
    before = sum(cpu_seconds(one.process) for one in kind.servers), postgres_seconds(database)
    with ThreadPoolExecutor(len(kind.servers)) as pool:
        loads = [pool.submit(load, one.port, kind.body, seconds=seconds, **options) for one in kind.servers]
        reports = [each.result() for each in loads]
    after = sum(cpu_seconds(one.process) for one in kind.servers), postgres_seconds(database)
    num_answers = max(1, sum(report["num_answers"] for report in reports))
    statuses: dict[str, int] = defaultdict(int)
    for report in reports:
        for status, number in report["statuses"].items():
            statuses[status] += number
    return Measured(
        per_second=sum(report["per_second"] for report in reports),
        p50_ms=max(report["p50_ms"] for report in reports),
        p99_ms=max(report["p99_ms"] for report in reports),
        api_cpu=(after[0] - before[0]) / num_answers * MICRO,
        postgres_cpu=(after[1] - before[1]) / num_answers * MICRO,
        generator_cpu=sum(report["cpu_seconds"] for report in reports) / num_answers * MICRO,
        statuses=dict(statuses),
    )


def limited_key(database: Engine) -> str:
    """A key of the default tenant, which has every limit from now on."""
    with session_factory(database).begin() as session:
        tenant = session.get_one(Tenant, DEFAULT_TENANT_ID)
        limits = Limits(
            requests_per_minute=PLENTY,
            tokens_per_minute=PLENTY,
            unfinished_jobs=PLENTY,
            queued_tokens=PLENTY,
            tokens_per_month=PLENTY,
        )
        administration.change_tenant(session, tenant.name, TenantChanges(limits=limits), actor="bench")
        return tenants.create_key(session, DEFAULT_TENANT_ID)


@contextmanager
def api(folder: Path, environment: dict[str, str], number: int, **settings: str) -> Iterator[list[Server]]:
    """`number` API processes."""
    names = {f"CELERIAC_{name.upper()}": value for name, value in settings.items()}
    with ExitStack() as stack:
        log = "-".join([*settings.values(), "api"])
        started = [
            stack.enter_context(
                server([sys.executable, "-c", SERVE], environment | names, folder / f"{log}-{place}.log")
            )
            for place in range(number)
        ]
        yield [Server(*one) for one in started]


def run(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
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
        trivial = [sys.executable, "-m", "bench.trivial_app"]
        with server(trivial, environment, folder / "trivial.log") as ceiling, ExitStack() as stack:
            anybody = stack.enter_context(api(folder, environment, given.processes, auth="none"))
            kinds = [*ceilings(folder, Server(*ceiling)), *hits(folder, anybody, database)]
            kinds.append(Kind("accept", "/v1/jobs", folder / "ceiling.json", anybody))
            key = limited_key(database)
            keyed = stack.enter_context(api(folder, environment, given.processes, auth="api_key"))
            kinds.append(Kind("accept, with keys and limits", "/v1/jobs", folder / "ceiling.json", keyed, key))
            kinds.append(
                next(kind for kind in kinds if kind.path == "/api/v1/infer")._replace(
                    name="hit, with keys and limits", servers=keyed, key=key
                )
            )
            figures = in_rounds(kinds, database, given)
        database.dispose()
    return figures


def ceilings(folder: Path, ceiling: Server) -> list[Kind]:
    body = folder / "ceiling.json"
    body.write_bytes(request_body())
    return [
        Kind("bare ASGI", "/bare", body, [ceiling]),
        Kind("FastAPI alone", "/fastapi", body, [ceiling]),
        Kind("our layers, nothing behind", "/v1/jobs", body, [ceiling]),
    ]


def hits(folder: Path, servers: list[Server], database: Engine) -> Iterator[Kind]:
    for path, fields in BODIES.items():
        body = {"model": MODEL} | fields
        ask_first(servers[0].port, path, body, database)
        file = folder / f"{path.replace('/', '-')}.json"
        file.write_bytes(orjson.dumps(body))
        yield Kind(f"hit, {path}", path, file, servers)


def in_rounds(kinds: list[Kind], database: Engine, given: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, list[Measured]] = defaultdict(list)
    for kind in kinds:
        measure(kind, database, seconds=1, connections=given.connections)  # warm
    for number in range(given.rounds):
        print(f"round {number + 1} of {given.rounds}, load {os.getloadavg()[0]:.1f}", flush=True)
        for kind in kinds:
            one = measure(kind, database, seconds=given.seconds, connections=given.connections)
            found[kind.name].append(one)
    return table(found)


def table(found: dict[str, list[Measured]]) -> dict[str, Any]:
    alone = [one.api_cpu for one in found["FastAPI alone"]]
    print(f"\n{'':32} {'/s':>7} {'p50':>7} {'p99 ms':>8}   CPU: {'API':>5} {'PG':>6} {'load':>5}   of FastAPI alone")
    figures: dict[str, Any] = {}
    for name, rounds in found.items():
        row = {
            field: round(statistics.median(getattr(one, field) for one in rounds), 1)
            for field in Measured._fields
            if field != "statuses"
        }
        row["ratio"] = round(statistics.median(one.api_cpu / each for one, each in zip(rounds, alone, strict=True)), 2)
        figures[name] = row | {"statuses": rounds[-1].statuses}
        print(
            f"{name:32} {row['per_second']:7.0f} {row['p50_ms']:7.1f} {row['p99_ms']:8.1f}        "
            f"{row['api_cpu']:5.0f} {row['postgres_cpu']:6.0f} {row['generator_cpu']:5.0f}   "
            f"{row['ratio']:5.2f}   {rounds[-1].statuses}",
            flush=True,
        )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--processes", type=int, default=1)
    given = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    with tempfile.TemporaryDirectory(prefix="celeriac-bench-", ignore_cleanup_errors=True) as folder:
        figures = run(Path(folder), given)
    print(json.dumps({"bench": "api_costs", "processes": given.processes, "kinds": figures}))


if __name__ == "__main__":
    main()
