"""An upgrade from the last release to this one under load, and what its clients notice of it.

    python -m tests.chaos.rolling_upgrade               # two minutes

Two APIs of the last release behind a balancer, two workers, maintenance. Clients of our library submit and stream jobs,
and the OpenAI SDK asks for completions with its own retries, all the while. Then, as docs/upgrades.md tells: migrate,
maintenance, the workers one by one, the APIs one by one, each taken out of the balancer a while before it is stopped,
as deploy/k8s does. Counted are failed requests, texts that lack or repeat a token, and what was tried again.
The last line is JSON; the exit code is 0 only if nothing failed.
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
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import httpx
import openai

from celeriac.client import Client
from gpu_worker.engine.fake_tokens import fake_text
from local.servers import EmbeddedPostgres, EmbeddedRedis
from tests.chaos.plant import Part
from tests.integration.upgrade_harness import (
    MODEL,
    THIS_RELEASE,
    Installation,
    Release,
    ReleaseApi,
    Schema,
    unpack_last_release,
)
from tests.waiting import wait_until

PROMPT_TOKEN_IDS = [1, 2, 3]
NUM_LIBRARY_CLIENTS, NUM_SDK_CLIENTS = 6, 4
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


@dataclass(slots=True)
class Tally:
    """What clients of one kind have seen."""

    num_done: int = 0
    num_tokens: int = 0
    failures: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    longest_seconds: float = 0.0
    num_retries: int = 0  # of the SDK, which tells


class Clients:
    def __init__(self, url: str) -> None:
        self._url = url
        self._is_over = threading.Event()
        self.library, self.sdk = Tally(), Tally()
        kinds: list[tuple[Callable[[int], None], int]] = [
            (self._use_library, NUM_LIBRARY_CLIENTS),
            (self._use_sdk, NUM_SDK_CLIENTS),
        ]
        self._threads = [threading.Thread(target=use, args=(number,)) for use, num in kinds for number in range(num)]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def _use_library(self, number: int) -> None:
        draw = random.Random(number)
        with Client(self._url) as client:
            while not self._is_over.is_set():
                num_tokens, seed = draw.randint(20, 150), draw.randrange(1000)
                with _noted(self.library, num_tokens):
                    job = client.submit(
                        prompt_token_ids=PROMPT_TOKEN_IDS,
                        model=MODEL,
                        max_tokens=num_tokens,
                        seed=seed,
                        ignore_eos=True,
                    )
                    text = "".join(event.text for event in client.stream(job.id))
                    expected = fake_text(PROMPT_TOKEN_IDS, seed, 0, num_tokens)
                    if text != expected:
                        self.library.wrong.append(f"{job.id}: {len(text)} characters instead of {len(expected)}")

    def _use_sdk(self, number: int) -> None:
        draw = random.Random(number)
        client = openai.OpenAI(base_url=f"{self._url}/v1", api_key="none", max_retries=8)
        while not self._is_over.is_set():
            num_tokens, seed = draw.randint(20, 100), draw.randrange(1000)
            with _noted(self.sdk, num_tokens):
                response = client.completions.with_raw_response.create(
                    model=MODEL,
                    prompt=PROMPT_TOKEN_IDS,
                    max_tokens=num_tokens,
                    seed=seed,
                    extra_body={"ignore_eos": True},
                )
                self.sdk.num_retries += response.retries_taken
                answer = response.parse()
                if answer.choices[0].text != fake_text(PROMPT_TOKEN_IDS, seed, 0, num_tokens):
                    self.sdk.wrong.append(f"{answer.id}: {len(answer.choices[0].text)} characters")
        client.close()


@contextmanager
def _noted(tally: Tally, num_tokens: int) -> Any:
    began_at = time.monotonic()
    try:
        yield
    except Exception as exc:  # whatever a client raises is what is counted here
        tally.failures.append(f"{type(exc).__name__}: {exc}"[:300])
        time.sleep(0.5)
    else:
        tally.num_done += 1
        tally.num_tokens += num_tokens
    tally.longest_seconds = max(tally.longest_seconds, time.monotonic() - began_at)


class Upgrade:
    """The steps of docs/upgrades.md."""

    def __init__(self, installation: Installation, balancer: Balancer, schema: Schema, old: Release) -> None:
        self._installation, self._balancer, self._schema = installation, balancer, schema
        self._maintenance = installation.start(old, "maintenance")
        self._workers = [installation.start_worker(old) for _ in range(2)]
        self._apis = [installation.start_api(old) for _ in range(2)]
        for api in self._apis:
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
        """A new one first, then the old one as Kubernetes does: out of the endpoints, a while, SIGTERM."""
        fresh = self._installation.start_api(THIS_RELEASE)
        self._balancer.add(fresh.url)
        leaving: ReleaseApi = self._apis[number]
        self._apis[number] = fresh
        self._balancer.remove(leaving.url)
        time.sleep(PRE_STOP_SECONDS)
        self._installation.stop(leaving.part)

    def parts(self) -> list[Part]:
        return [self._maintenance, *self._workers, *(api.part for api in self._apis)]

    def _wait_for_workers(self, num: int) -> None:
        def num_ready() -> int:
            with suppress(httpx.HTTPError, ValueError, KeyError):
                queues = httpx.get(f"{self._apis[0].url}/v1/queue", timeout=5).json()["data"]
                return sum(queue["workers"] for queue in queues)
            return 0

        wait_until(lambda: num_ready() >= num, f"{num} workers are ready", pause_seconds=0.1)


def upgrade_under_load(*, pause_seconds: float) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp(prefix="celeriac-upgrade-"))
    folder.chmod(0o755)
    last_release = unpack_last_release(folder)
    with (
        EmbeddedPostgres(folder / "postgres") as postgres,
        EmbeddedRedis(folder / "redis") as redis,
        Installation(folder, postgres.url, redis.url) as installation,
        Balancer() as balancer,
    ):
        installation.run(last_release, "migrate")
        schema = Schema(postgres.url)
        upgrade = Upgrade(installation, balancer, schema, last_release)
        clients = Clients(f"http://127.0.0.1:{balancer.port}")
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
        schema.close()
    shutil.rmtree(folder, ignore_errors=True)
    kinds = {"library": clients.library, "openai": clients.sdk}
    for kind, tally in kinds.items():
        for line in (*tally.failures[:10], *tally.wrong[:10]):
            print(f"{kind}: {line}")
    return {
        kind: {
            "done": tally.num_done,
            "tokens": tally.num_tokens,
            "failed": len(tally.failures),
            "wrong": len(tally.wrong),
            "retries": tally.num_retries,
            "longest_seconds": round(tally.longest_seconds, 1),
        }
        for kind, tally in kinds.items()
    } | {"load": round(os.getloadavg()[0], 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pause-seconds", type=float, default=5.0, help="of undisturbed work between two steps")
    report = upgrade_under_load(pause_seconds=parser.parse_args().pause_seconds)
    print(json.dumps(report))
    return int(any(report[kind][what] for kind in ("library", "openai") for what in ("failed", "wrong")))


if __name__ == "__main__":
    sys.exit(main())
