"""What a second API process gives: as many requests as one and a half, or as two?

    python -m bench.api_processes               # one and two processes by turns: three minutes; root, on Linux

Each API process may take a tenth of a core (`--quota`), by a control group of its own, so that PostgreSQL, Redis and
the clients have the rest of the machine also beside two of them: else a second process would take from them what it
uses. In each round, one process and two on one port (`celeriac api --processes 2`) are sent as many requests as they
answer, one kind after another, so the ratio holds on a busy machine, too; rates do not, since a process that may use
less than a core also waits for its turns. It says nothing about PostgreSQL, which both share. The last line is JSON.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import psutil

from bench.accept import cpu_seconds, load, request_body, server
from bench.response_cache import BODIES, MODEL, ask_first
from local.servers import EmbeddedPostgres, EmbeddedRedis
from storage.database import migrate, open_database

GROUPS = (Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup"))  # version 1, version 2
PERIOD_MICROSECONDS = 20_000  # short, so that a process that has used up its share waits for no more than that
START_SECONDS = 60.0


class Measured(NamedTuple):
    per_second: float
    api_cpu_share: float  # of what the processes may use
    machine_share: float  # of all cores
    statuses: dict[str, int]


@contextmanager
def bounded(processes: list[psutil.Process], quota: float) -> Iterator[None]:
    """Each process may use that share of a core."""
    root = next(root for root in GROUPS if (root / "cgroup.procs").exists())
    groups = [root / f"celeriac-bench-{process.pid}" for process in processes]
    microseconds = round(quota * PERIOD_MICROSECONDS)
    try:
        for group, process in zip(groups, processes, strict=True):
            group.mkdir()
            if (group / "cpu.max").exists():
                (group / "cpu.max").write_text(f"{microseconds} {PERIOD_MICROSECONDS}")
            else:
                (group / "cpu.cfs_period_us").write_text(str(PERIOD_MICROSECONDS))
                (group / "cpu.cfs_quota_us").write_text(str(microseconds))
            (group / "cgroup.procs").write_text(str(process.pid))
        yield
    finally:
        for group in groups:
            with suppress(OSError):
                for pid in (group / "cgroup.procs").read_text().split():
                    (root / "cgroup.procs").write_text(pid)
                group.rmdir()


class Apis(NamedTuple):
    number: int
    port: int
    processes: list[psutil.Process]


@contextmanager
def apis(number: int, folder: Path, environment: dict[str, str]) -> Iterator[Apis]:
    command = [sys.executable, "-m", "celeriac", "api", "--processes", str(number)]
    with server(command, environment, folder / f"api-{number}.log") as (first, port):
        ends_at = time.monotonic() + START_SECONDS
        while number > 1 and len(first.children()) < number and time.monotonic() < ends_at:
            time.sleep(0.1)
        yield Apis(number, port, first.children() if number > 1 else [first])


def measure(api: Apis, path: str, body: Path, given: argparse.Namespace) -> Measured:
    before, idle_before = sum(map(cpu_seconds, api.processes)), psutil.cpu_times()
    began_at = time.monotonic()
    report = load(api.port, body, path=path, seconds=given.seconds, connections=given.connections, rate=None)
    seconds, idle_after = time.monotonic() - began_at, psutil.cpu_times()
    used = sum(map(cpu_seconds, api.processes)) - before
    num_cores = os.cpu_count() or 1
    return Measured(
        per_second=report["per_second"],
        api_cpu_share=used / (given.seconds * given.quota * api.number),
        machine_share=1 - (idle_after.idle - idle_before.idle) / (seconds * num_cores),
        statuses=report["statuses"],
    )


def kinds(folder: Path, port: int, database_url: str) -> dict[str, tuple[str, Path]]:
    """The path and the body of each kind of request."""
    accept, hit = folder / "accept.json", folder / "hit.json"
    accept.write_bytes(request_body())
    fields: dict[str, Any] = {"model": MODEL} | BODIES["/v1/chat/completions"]
    database = open_database(database_url)
    ask_first(port, "/v1/chat/completions", fields, database)
    database.dispose()
    hit.write_bytes(orjson.dumps(fields))
    return {"accept a job": ("/v1/jobs", accept), "answer that is known": ("/v1/chat/completions", hit)}


def run(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    with EmbeddedPostgres(folder / "postgres") as postgres, EmbeddedRedis(folder / "redis") as redis:
        migrate(postgres.url)
        environment = {
            "CELERIAC_DATABASE_URL": postgres.url,
            "CELERIAC_REDIS_URL": redis.url,
            "CELERIAC_AUTH": "none",
            "CELERIAC_MAX_QUEUED_JOBS": str(10**8),
            "CELERIAC_RESPONSE_CACHE": "greedy",
            "CELERIAC_NO_WORKERS_SECONDS": "86400",
            "CELERIAC_PORT": "0",
        }
        with ExitStack() as stack:
            one, two = (stack.enter_context(apis(number, folder, environment)) for number in (1, 2))
            asked = kinds(folder, one.port, postgres.url)
            for api in (one, two):
                for path, body in asked.values():
                    load(api.port, body, path=path, seconds=2, connections=given.connections, rate=None)  # warm
            stack.enter_context(bounded([*one.processes, *two.processes], given.quota))
            return in_rounds(one, two, asked, given)


def in_rounds(one: Apis, two: Apis, asked: dict[str, tuple[str, Path]], given: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, list[tuple[Measured, Measured]]] = defaultdict(list)
    for number in range(given.rounds):
        for name, (path, body) in asked.items():
            pair = measure(one, path, body, given), measure(two, path, body, given)
            found[name].append(pair)
            print(f"round {number + 1}, {name}: {pair[0].per_second:.0f}/s, {pair[1].per_second:.0f}/s", flush=True)
    return {name: summary(name, pairs) for name, pairs in found.items()}


def summary(name: str, pairs: list[tuple[Measured, Measured]]) -> dict[str, Any]:
    ratio = statistics.median(two.per_second / one.per_second for one, two in pairs)
    figures: dict[str, Any] = {"ratio": round(ratio, 2)}
    for place, number in enumerate(("one", "two")):
        rounds = [pair[place] for pair in pairs]
        for field in ("per_second", "api_cpu_share", "machine_share"):
            figures[f"{number}_{field}"] = round(statistics.median(getattr(each, field) for each in rounds), 2)
        figures[f"{number}_statuses"] = rounds[-1].statuses
    print(
        f"{name:22} {figures['one_per_second']:6.0f}/s -> {figures['two_per_second']:6.0f}/s: {ratio:.2f} times; "
        f"{100 * figures['two_machine_share']:.0f} % of the machine was busy",
        flush=True,
    )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6)
    parser.add_argument("--connections", type=int, default=96)
    parser.add_argument("--quota", type=float, default=0.1, help="of a core, for each API process")
    given = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print(f"ceiling: twice as many with two processes, {given.quota:.0%} of a core each")
    with tempfile.TemporaryDirectory(prefix="celeriac-bench-", ignore_cleanup_errors=True) as folder:
        os.chmod(folder, 0o755)
        figures = run(Path(folder), given)
    print(json.dumps({"bench": "api_processes", "quota": given.quota, "kinds": figures, "load": os.getloadavg()[0]}))


if __name__ == "__main__":
    main()
