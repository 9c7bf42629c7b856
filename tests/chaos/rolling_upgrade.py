"""An upgrade from the last release to this one under load, and what its clients notice of it.

    python -m tests.chaos.rolling_upgrade                  # two minutes
    python -m tests.chaos.rolling_upgrade --same           # a rolling restart of this release
    python -m tests.chaos.rolling_upgrade --same --front nginx    # or caddy, which must be installed

Two APIs of the last release behind a balancer, two workers, maintenance; and clients of eight kinds
(tests/chaos/upgrade_clients.py) that work all the while. Then, as docs/upgrades.md tells: migrate, maintenance, the
workers one by one, the APIs one by one, each taken out of the balancer a while before it is stopped, as deploy/k8s
does. Behind nginx or Caddy, which are set up as docs/operations.md has them, each API is stopped and started again on
its port, and the proxy has to find out. Counted are failed requests, texts that lack or repeat a token, and what was
tried again. The last line is JSON; the exit code is 0 only if nothing failed.

The APIs of the last release end all streams at once when they are stopped, so those of OpenAI's SDK, which cannot be
resumed, may fail as the last release ends, and do not count.
"""

import argparse
import asyncio
import json
import os
import random
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import httpx

from local.servers import EmbeddedPostgres, EmbeddedRedis
from tests.chaos.fronts import ROOT_PATH, front
from tests.chaos.upgrade_clients import Clients
from tests.integration.upgrade_harness import (
    THIS_RELEASE,
    Installation,
    Release,
    ReleaseApi,
    Schema,
    unpack_last_release,
)
from tests.waiting import wait_until

PRE_STOP_SECONDS = 3.0  # deploy/k8s has ten
CHECK_SECONDS = 0.5
READ_BYTES = 65_536


class Balancer:
    """Forwards each connection to an API that says it is ready. Runs a loop in a thread of its own."""

    def __init__(self) -> None:
        self.port = 0
        self._targets: dict[str, bool] = {}  # whether it was ready, by URL
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()
        return self

    def __exit__(self, *exc_info: object) -> None:
        asyncio.run_coroutine_threadsafe(self._end_all(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def add(self, url: str) -> None:
        """Returns once it gets connections."""
        self._targets[url] = False
        wait_until(lambda: self._targets[url], f"{url} is ready")

    def remove(self, url: str) -> None:
        """Its connections go on, as those of a pod that is terminating."""
        del self._targets[url]

    async def _end_all(self) -> None:
        """A loop that merely stops leaves tasks behind, which say so when they are collected."""
        self._server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._forward, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        self._checking = asyncio.create_task(self._check_forever())

    async def _check_forever(self) -> None:
        async with httpx.AsyncClient(timeout=2, trust_env=False) as http:
            while True:
                for url in list(self._targets):
                    is_ready = False
                    with suppress(httpx.HTTPError):
                        is_ready = (await http.get(f"{url}/health/ready")).status_code == 200
                    if url in self._targets:
                        self._targets[url] = is_ready
                await asyncio.sleep(CHECK_SECONDS)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ready = [url for url, is_ready in self._targets.items() if is_ready]
        try:
            port = int(random.choice(ready).rpartition(":")[2])
            upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", port)
        except (OSError, IndexError):
            writer.close()
            return
        await asyncio.gather(_copy(reader, upstream_writer), _copy(upstream_reader, writer))


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(READ_BYTES):
            writer.write(data)
            await writer.drain()
    writer.close()


class Upgrade:
    """The steps of docs/upgrades.md. Without a balancer, APIs are replaced on their ports."""

    def __init__(self, installation: Installation, balancer: Balancer | None, schema: Schema, old: Release) -> None:
        self._installation, self._balancer, self._schema = installation, balancer, schema
        self._maintenance = installation.start(old, "maintenance")
        self._workers = [installation.start_worker(old) for _ in range(2)]
        self.apis = [installation.start_api(old) for _ in range(2)]
        for api in self.apis:
            if balancer is not None:
                balancer.add(api.url)
        self._wait_for_workers(2)

    def migrate(self) -> None:
        self._schema.upgrade("head")

    def replace_maintenance(self) -> None:
        self._installation.stop(self._maintenance)
        self._maintenance = self._installation.start(THIS_RELEASE, "maintenance")

    def replace_worker(self, number: int) -> None:
        self._installation.stop(self._workers[number])
        self._workers[number] = self._installation.start_worker(THIS_RELEASE)
        self._wait_for_workers(2)

    def replace_api(self, number: int) -> None:
        """Behind the balancer a new one first, then the old one as Kubernetes does: out of the endpoints, a while,
        SIGTERM."""
        leaving: ReleaseApi = self.apis[number]
        if self._balancer is None:
            self._installation.stop(leaving.part)
            self.apis[number] = self._installation.start_api(THIS_RELEASE, port=leaving.port)
            return
        fresh = self._installation.start_api(THIS_RELEASE)
        self._balancer.add(fresh.url)
        self.apis[number] = fresh
        self._balancer.remove(leaving.url)
        time.sleep(PRE_STOP_SECONDS)
        self._installation.stop(leaving.part)

    def _wait_for_workers(self, num: int) -> None:
        def num_ready() -> int:
            with suppress(httpx.HTTPError, ValueError, KeyError):
                queues = httpx.get(f"{self.apis[0].url}/v1/queue", timeout=5).json()["data"]
                return sum(queue["workers"] for queue in queues)
            return 0

        wait_until(lambda: num_ready() >= num, f"{num} workers are ready", pause_seconds=0.1)


@contextmanager
def upgrading(
    installation: Installation, schema: Schema, old: Release, kind: str | None
) -> Iterator[tuple[Upgrade, str]]:
    """The old release at work, and the URL of its APIs."""
    if kind is not None:
        upgrade = Upgrade(installation, None, schema, old)
        with front(kind, [api.port for api in upgrade.apis]) as url:
            yield upgrade, url
        return
    with Balancer() as balancer:
        yield Upgrade(installation, balancer, schema, old), f"http://127.0.0.1:{balancer.port}"


def upgrade_under_load(given: argparse.Namespace) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp(prefix="celeriac-upgrade-"))
    folder.chmod(0o755)
    old = THIS_RELEASE if given.same else unpack_last_release(folder)
    more = {"ROOT_PATH": ROOT_PATH} if given.front else {}
    with (
        EmbeddedPostgres(folder / "postgres") as postgres,
        EmbeddedRedis(folder / "redis") as redis,
        Installation(folder, postgres.url, redis.url, **more) as installation,
    ):
        installation.run(old, "migrate")
        schema = Schema(postgres.url)
        with upgrading(installation, schema, old, given.front) as (upgrade, url):
            clients = work_through(upgrade, url, given.pause_seconds)
        schema.close()
    shutil.rmtree(folder, ignore_errors=True)
    return report_on(clients)


def work_through(upgrade: Upgrade, url: str, pause_seconds: float) -> Clients:
    clients = Clients(url)
    steps: list[tuple[str, Callable[[], None]]] = [
        ("migrate", upgrade.migrate),
        ("maintenance", upgrade.replace_maintenance),
        ("first worker", lambda: upgrade.replace_worker(0)),
        ("second worker", lambda: upgrade.replace_worker(1)),
        ("first API", lambda: upgrade.replace_api(0)),
        ("second API", lambda: upgrade.replace_api(1)),
    ]
    try:
        for name, step in steps:
            time.sleep(pause_seconds)
            began_at = time.monotonic()
            step()
            print(f"{name}: {time.monotonic() - began_at:.1f} s", flush=True)
        time.sleep(pause_seconds)
    finally:
        clients.close()
    return clients


def report_on(clients: Clients) -> dict[str, Any]:
    for kind, tally in clients.tallies.items():
        for line in (*tally.failures[:10], *tally.wrong[:10]):
            print(f"{kind}: {line}")
    return {kind: tally.report() for kind, tally in clients.tallies.items()} | {"load": round(os.getloadavg()[0], 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pause-seconds", type=float, default=5.0, help="of undisturbed work between two steps")
    parser.add_argument("--same", action="store_true", help="restart this release instead of upgrading to it")
    parser.add_argument("--front", choices=("nginx", "caddy"), help="a proxy before the APIs instead of the balancer")
    given = parser.parse_args()
    report = upgrade_under_load(given)
    print(json.dumps(report))
    uncounted = () if given.same else ("openai stream",)
    counted = [tally for kind, tally in report.items() if kind not in ("load", *uncounted)]
    return int(any(tally["failed"] or tally["wrong"] for tally in counted))


if __name__ == "__main__":
    sys.exit(main())
