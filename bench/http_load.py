"""A lean HTTP load generator in a process of its own: keep-alive sockets, prebuilt requests, one at a time on each.

    python -m bench.http_load --port 8000 --path /v1/jobs --body body.json --connections 64 --seconds 10 [--rate 1500]

Without --rate the loop is closed: every connection posts again as soon as it is answered. With --rate the loop is open:
requests are due as a Poisson process, and latencies count from when a request was due, so that a server that stalls
cannot hide the requests it delayed. Prints one JSON line.
"""

import argparse
import asyncio
import json
import random
import time
from collections import Counter, deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import uvloop


@dataclass(frozen=True, slots=True)
class LoadReport:
    num_answers: int
    seconds: float
    per_second: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    max_ms: float
    statuses: dict[str, int]
    num_unsent: int  # due at the end and still waiting for a free connection
    cpu_seconds: float


class Load:
    """The state that all connections share: the request, the schedule and the counts."""

    def __init__(self, request: bytes, *, seconds: float, rate: float | None) -> None:
        self.request = request
        self.rate = rate
        self.latencies: list[float] = []
        self.statuses: Counter[str] = Counter()
        self.due: deque[float] = deque()  # times of requests that wait for a connection
        self.idle: deque[Connection] = deque()
        self.ends_at = time.perf_counter() + seconds

    def answered(self, connection: "Connection", status: str, due_at: float) -> None:
        now = time.perf_counter()
        self.latencies.append(now - due_at)
        self.statuses[status] += 1
        if now >= self.ends_at:
            return
        if self.rate is None:
            connection.post(now)
        elif self.due:
            connection.post(self.due.popleft())
        else:
            self.idle.append(connection)

    async def schedule(self) -> None:
        """Make requests due at `rate` until the end."""
        assert self.rate is not None
        next_at = time.perf_counter()
        while next_at < self.ends_at:
            now = time.perf_counter()
            while next_at <= now:
                if self.idle:
                    self.idle.popleft().post(next_at)
                else:
                    self.due.append(next_at)
                next_at += random.expovariate(self.rate)
            await asyncio.sleep(max(next_at - time.perf_counter(), 0))


class Connection(asyncio.Protocol):
    def __init__(self, load: Load) -> None:
        self._load = load
        self._buffer = b""
        self._due_at = 0.0
        self.is_waiting = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's has the same interface, but another base class

    def post(self, due_at: float) -> None:
        self._due_at = due_at
        self.is_waiting = True
        self._transport.write(self._load.request)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head_end = self._buffer.find(b"\r\n\r\n")
        if head_end < 0:
            return
        length_at = self._buffer.find(b"content-length: ")
        length_end = self._buffer.find(b"\r\n", length_at)
        if len(self._buffer) < head_end + 4 + int(self._buffer[length_at + 16 : length_end]):
            return
        status, self._buffer = self._buffer[9:12].decode(), b""
        self.is_waiting = False
        self._load.answered(self, status, self._due_at)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.is_waiting:
            self._load.statuses["connection lost"] += 1
            self.is_waiting = False


async def run(
    port: int,
    path: str,
    body: bytes,
    *,
    connections: int,
    seconds: float,
    rate: float | None,
    key: str | None,
) -> LoadReport:
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    head += "" if key is None else f"\r\nauthorization: Bearer {key}"
    load = Load(f"{head}\r\n\r\n".encode() + body, seconds=seconds, rate=rate)
    loop = asyncio.get_running_loop()
    opened = [await loop.create_connection(lambda: Connection(load), "127.0.0.1", port) for _ in range(connections)]
    protocols = [protocol for _, protocol in opened]
    started, cpu_started = time.perf_counter(), time.process_time()
    load.ends_at = started + seconds
    if rate is None:
        for protocol in protocols:
            protocol.post(time.perf_counter())
    else:
        load.idle.extend(protocols)
        await load.schedule()
    await _settle(load, protocols)
    elapsed = time.perf_counter() - started
    for transport, _ in opened:
        transport.close()
    return _report(load, elapsed, time.process_time() - cpu_started)


async def _settle(load: Load, protocols: list[Connection]) -> None:
    """Wait until every request sent is answered, but at most ten seconds past the end."""
    while time.perf_counter() < load.ends_at or any(protocol.is_waiting for protocol in protocols):
        await asyncio.sleep(0.01)
        if time.perf_counter() > load.ends_at + 10:
            return


def _report(load: Load, elapsed: float, cpu_seconds: float) -> LoadReport:
    latencies = sorted(load.latencies) or [0.0]

    def quantile(share: float) -> float:
        return round(latencies[min(int(share * len(latencies)), len(latencies) - 1)] * 1000, 2)

    return LoadReport(
        num_answers=len(load.latencies),
        seconds=round(elapsed, 3),
        per_second=round(len(load.latencies) / elapsed, 1),
        p50_ms=quantile(0.5),
        p90_ms=quantile(0.9),
        p99_ms=quantile(0.99),
        max_ms=quantile(1.0),
        statuses=dict(load.statuses),
        num_unsent=len(load.due),
        cpu_seconds=round(cpu_seconds, 2),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--path", default="/v1/jobs")
    parser.add_argument("--body", type=Path, required=True)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--key", help="an API key")
    given = parser.parse_args()
    body = given.body.read_bytes()
    limits = {"connections": given.connections, "seconds": given.seconds, "rate": given.rate}
    job = run(given.port, given.path, body, key=given.key, **limits)
    print(json.dumps(asdict(uvloop.run(job))))


if __name__ == "__main__":
    main()
