"""Measures how many webhooks one maintenance process delivers, with fsync on: `python -m bench.webhooks`.

Prints the ceiling (the same signed POSTs by the same client without a database, as many at a time as one host gets),
the same with httpcore's own pool, to one host and to --pool-hosts (docs/adr/0031), and then the measurement: the time
from the commit that makes --deliveries due at once until all of them are recorded as delivered, for one receiving host
and for --hosts. Last comes one JSON line. The receivers answer immediately.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from uuid import uuid4

import httpcore
import psutil
from sqlalchemy import func, insert, select
from sqlalchemy.orm import Session, sessionmaker

from bench.accept import cpu_seconds
from domain.webhooks import DeliveryStatus, WebhookUrl, payload, signature_headers
from local.servers import EmbeddedPostgres, EmbeddedRedis
from maintenance.webhooks import MAX_PER_HOST
from settings import ROOT, Settings
from storage import webhooks
from storage.database import migrate, open_database, session_factory
from storage.tables import DEFAULT_TENANT_ID
from storage.webhooks import WebhookDelivery
from tasks.webhook_http import (
    KEEPALIVE_SECONDS,
    MAX_CONNECTIONS,
    GuardedNetwork,
    TargetGuard,
    WebhookClient,
    WebhookResponse,
)

ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"
DEADLINE_SECONDS = 300
TYPE = "job.completed"


class Receiver(asyncio.Protocol):
    """Answers each POST when its last byte has arrived. Parses only its length."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._received = b""

    def data_received(self, data: bytes) -> None:
        self._received += data
        while (length := _request_length(self._received)) is not None and len(self._received) >= length:
            self._received = self._received[length:]
            self._transport.write(ANSWER)


def _request_length(received: bytes) -> int | None:
    """The length of the whole request; None if the head is incomplete."""
    head, blank, _ = received.lower().partition(b"\r\n\r\n")
    if not blank:
        return None
    return len(head) + 4 + int(head.partition(b"content-length:")[2].split(b"\r\n")[0])


def _receive(ports: Connection, num_hosts: int) -> None:
    """Runs in the receivers' process."""

    async def serve() -> None:
        loop = asyncio.get_running_loop()
        servers = [await loop.create_server(Receiver, "127.0.0.1", 0) for _ in range(num_hosts)]
        ports.send([server.sockets[0].getsockname()[1] for server in servers])
        await asyncio.Event().wait()

    asyncio.run(serve())


@contextmanager
def receivers(num_hosts: int) -> Iterator[list[str]]:
    """URLs of receivers on different ports, which the sender treats as different hosts."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_receive, args=(theirs, num_hosts), daemon=True)
    process.start()
    try:
        yield [f"http://localhost:{port}/hook" for port in ours.recv()]
    finally:
        process.terminate()
        process.join()


class PoolClient:
    """Like WebhookClient, but with httpcore's connection pool."""

    def __init__(self, guard: TargetGuard) -> None:
        network = GuardedNetwork(guard, "http")
        self._pool = httpcore.AsyncConnectionPool(
            max_connections=MAX_CONNECTIONS, keepalive_expiry=KEEPALIVE_SECONDS, network_backend=network
        )

    async def post(self, url: WebhookUrl, headers: dict[str, str], body: bytes) -> WebhookResponse:
        all_headers = {"host": url.host, "content-length": str(len(body))} | headers
        answer = await self._pool.request("POST", str(url), headers=list(all_headers.items()), content=body)
        return WebhookResponse(answer.status, None, 0.0)

    async def aclose(self) -> None:
        await self._pool.aclose()


async def bench_client(
    make: Callable[[TargetGuard], WebhookClient | PoolClient], urls: Sequence[str], secret: str, num_posts: int
) -> float:
    """Returns answers per second."""
    guard = TargetGuard(Settings(webhook_private_targets=True))
    client, numbers = make(guard), iter(range(num_posts))

    async def post_in_turn() -> None:
        for number in numbers:
            event_id = uuid4()
            body = payload(event_id, TYPE, datetime.now(UTC))
            headers = signature_headers(event_id, body, [secret], int(time.time()))
            assert (await client.post(guard.parse(urls[number % len(urls)]), headers, body)).is_success

    started = time.perf_counter()
    await asyncio.gather(*(post_in_turn() for _ in range(MAX_PER_HOST)))
    seconds = time.perf_counter() - started
    await client.aclose()
    return num_posts / seconds


def bench_clients(secret: str, num_posts: int, num_hosts: int) -> dict[str, float]:
    """Answers per second with our connections and with httpcore's pool, to one host and to many."""
    rates = {}
    with receivers(num_hosts) as urls:
        for hosts, few in (("1 host", urls[:1]), (f"{num_hosts} hosts", urls)):
            for name, make in (("ours", WebhookClient), ("httpcore's pool", PoolClient)):
                rate = rates[f"{name}, {hosts}"] = asyncio.run(bench_client(make, few, secret, num_posts))
                print(f"{f'POSTs over {name}, {hosts}':44} {rate:7.0f}/s", flush=True)
    return rates


@contextmanager
def maintenance(environment: dict[str, str], log: Path) -> Iterator[psutil.Process]:
    command = [str(Path(sys.executable).with_name("celeriac")), "maintenance"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, stdout=output, stderr=output)
    try:
        yield psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(timeout=60)


def deliver(sessions: sessionmaker[Session], urls: Sequence[str], num_deliveries: int) -> float:
    """Returns the seconds from the commit until all are delivered."""
    rows = [
        {"tenant_id": DEFAULT_TENANT_ID, "event_id": uuid4(), "type": TYPE, "url": urls[number % len(urls)]}
        for number in range(num_deliveries)
    ]
    with sessions.begin() as session:
        session.execute(insert(WebhookDelivery), rows)
    started = time.perf_counter()
    pending = select(func.count()).where(WebhookDelivery.status == DeliveryStatus.PENDING)
    while time.perf_counter() < started + DEADLINE_SECONDS:
        with sessions() as session:
            if not session.scalar(pending):
                return time.perf_counter() - started
        time.sleep(0.02)
    raise RuntimeError(f"not all were delivered within {DEADLINE_SECONDS} s")


def measured(
    name: str, process: psutil.Process, sessions: sessionmaker[Session], urls: Sequence[str], num_deliveries: int
) -> float:
    """Returns deliveries per second."""
    before = cpu_seconds(process)
    rate = num_deliveries / deliver(sessions, urls, num_deliveries)
    cpu = (cpu_seconds(process) - before) / num_deliveries * 1e6
    print(f"{name:44} {rate:7.0f}/s   CPU {cpu:5.0f} us each", flush=True)
    return rate


def run(folder: Path, given: argparse.Namespace) -> dict[str, float]:
    with (
        EmbeddedPostgres(folder / "postgres") as postgres,
        EmbeddedRedis(folder / "redis") as redis,
        receivers(given.hosts) as urls,
    ):
        migrate(postgres.url)
        database = open_database(postgres.url)
        sessions = session_factory(database)
        with sessions.begin() as session:
            secret = webhooks.tenant_secret(session, DEFAULT_TENANT_ID).secret
        ceiling = asyncio.run(bench_client(WebhookClient, urls[:1], secret, given.deliveries))
        print(f"{f'ceiling: {MAX_PER_HOST} POSTs at a time, no database':44} {ceiling:7.0f}/s", flush=True)
        bench_clients(secret, given.deliveries // 5, given.pool_hosts)
        environment = {
            "CELERIAC_DATABASE_URL": postgres.url,
            "CELERIAC_REDIS_URL": redis.url,
            "CELERIAC_WEBHOOK_PRIVATE_TARGETS": "true",
        }
        with maintenance(environment, folder / "maintenance.log") as process:
            deliver(sessions, urls, 2 * len(urls))  # warms it up, and every host
            one = measured("one host", process, sessions, urls[:1], given.deliveries)
            several = measured(f"{given.hosts} hosts", process, sessions, urls, given.deliveries)
        database.dispose()
    return {"ceiling_per_second": ceiling, "one_host_per_second": one, "hosts_per_second": several}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deliveries", type=int, default=5_000)
    parser.add_argument("--hosts", type=int, default=8)
    parser.add_argument("--pool-hosts", type=int, default=64)
    given = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(f"load {os.getloadavg()[0]:.1f}, {given.deliveries} deliveries a run\n")
    with tempfile.TemporaryDirectory(prefix="celeriac-bench-", ignore_cleanup_errors=True) as folder:
        figures = run(Path(folder), given)
    print(json.dumps({"bench": "webhooks", "deliveries": given.deliveries, "hosts": given.hosts, **figures}))


if __name__ == "__main__":
    main()
