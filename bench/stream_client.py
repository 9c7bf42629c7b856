"""A client of event streams that costs next to nothing, so that it is not what is measured.

`python -m bench.stream_client URL JSON NUM` has NUM completions under way at any time, each with the body JSON, until
it is ended.
"""

import asyncio
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit


@dataclass(frozen=True, slots=True)
class Streamed:
    """`arrivals` are the times at which events came, by time.perf_counter(); those read at once have one."""

    num_tokens: int
    arrivals: list[float]


class _Reader(asyncio.Protocol):
    """Notes when something came, and looks at what it was only at the end."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self._received = bytearray()
        self.arrivals: list[float] = []
        self.body: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        if b"data: {" in data and b'"choices":[]' not in data:  # the latter brings the usage, after all tokens
            self.arrivals.append(time.perf_counter())
        self._received += data

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.body.done():
            self.body.set_result(bytes(self._received))


async def stream_completion(url: str, body: Mapping[str, Any]) -> Streamed:
    """POST to /v1/completions. If the server does not tell how many tokens there were, each event counts as one."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    assert parts.port is not None
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    loop = asyncio.get_running_loop()
    _, reader = await loop.create_connection(lambda: _Reader(head.encode() + content), parts.hostname, parts.port)
    answer = await reader.body
    assert answer.startswith(b"HTTP/1.1 200"), answer[:1000]
    events = [json.loads(line[6:]) for line in answer.splitlines() if line.startswith(b"data: {")]
    usage = next((event["usage"] for event in reversed(events) if event.get("usage")), None)
    num_tokens = sum(bool(event.get("choices")) for event in events) if usage is None else usage["completion_tokens"]
    return Streamed(num_tokens, reader.arrivals)


async def _stream_forever(url: str, body: Mapping[str, Any], num_at_once: int) -> None:
    async def one_after_another() -> None:
        while True:
            await stream_completion(url, body)

    await asyncio.gather(*(one_after_another() for _ in range(num_at_once)))


if __name__ == "__main__":
    asyncio.run(_stream_forever(sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])))
