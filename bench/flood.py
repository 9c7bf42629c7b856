"""Sends requests as fast as they are answered, over many connections: `python -m bench.flood URL`, a Push on stdin.

A process of its own, so that making the requests does not delay those that are measured; and with plain sockets, since
a client library would take more CPU time than the server. The key is in CELERIAC_API_KEY. On SIGTERM it prints one line
of JSON: how often each answer came. It neither waits after a refusal nor minds what it is told.
"""

import asyncio
import itertools
import json
import os
import random
import signal
import sys
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any
from urllib.parse import urlsplit

import uvloop

PATIENCE_SECONDS = 3.0  # for the whole of one answer; then the client hangs up and comes back
PIECE = 65_536
NO_BODY = (204, 304)
LARGE_BYTES = 100_000_000

_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Step:
    """A request. In its path, headers and body, @name@ stands for a value, and @unique@ for another text each time."""

    method: str
    path: str
    body: str | None = None
    headers: dict[str, str] = field(default_factory=dict)  # an empty one is not sent
    gives: str = ""  # the value that the `id` of the answer becomes
    repeated: int = 1  # times that the body is sent in this one request
    version: str = "1.1"

    def rendered(self, values: dict[str, str]) -> list[bytes]:
        """In pieces."""
        values = values | {"unique": f"{next(_numbers)}-{random.random()}"}
        body = None if self.body is None else filled(self.body, values).encode()
        length = 0 if body is None else self.repeated * len(body)
        own = {"host": "localhost", "authorization": "Bearer @key@", "content-length": str(length) if body else ""}
        own |= {"content-type": "application/json"} if body else {}
        lines = [f"{name}: {value}" for name, value in (own | self.headers).items() if value]
        head = "\r\n".join([f"{self.method} {self.path} HTTP/{self.version}", *lines, "", ""])
        return [filled(head, values).encode(), *itertools.repeat(body, self.repeated if body else 0)]  # type: ignore[list-item]


@dataclass(frozen=True, slots=True)
class Push:
    """What one tenant sends: `steps` one after the other on each of `clients` connections; or `wild`, a function of
    WILD."""

    steps: list[Step] = field(default_factory=list)
    clients: int = 60
    values: dict[str, str] = field(default_factory=dict)
    pipelined: int = 1  # requests that are sent before the first answer is read
    is_cut: bool = False  # hang up at the first bytes of an answer
    is_new: bool = False  # a new connection for each request
    wild: str = ""

    def dumped(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def loaded(cls, text: str) -> "Push":
        given: dict[str, Any] = json.loads(text)
        return cls(**given | {"steps": [Step(**step) for step in given["steps"]]})


def filled(text: str, values: dict[str, str]) -> str:
    if "@" in text:
        for name, value in values.items():
            text = text.replace(f"@{name}@", value)
    return text


@dataclass(slots=True)
class Target:
    host: str
    port: int
    push: Push
    tally: Counter[str] = field(default_factory=Counter)

    async def connect(self) -> "Line":
        return Line(*await asyncio.open_connection(self.host, self.port))

    @property
    def values(self) -> dict[str, str]:
        return self.push.values | {"key": os.environ["CELERIAC_API_KEY"]}


@dataclass(slots=True)
class Line:
    """A connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def send(self, pieces: Iterable[bytes]) -> None:
        for piece in pieces:
            self.writer.write(piece)
            await self.writer.drain()

    async def answer(self, method: str) -> tuple[int, bytes, bytes]:
        """Its status, its head in small letters, and its body. Raises OSError, EOFError or ValueError."""
        head = (await self.reader.readuntil(b"\r\n\r\n")).lower()
        status = int(head[9:12])
        return status, head, await self._body(method, status, head)

    async def _body(self, method: str, status: int, head: bytes) -> bytes:
        if method == "HEAD" or status in NO_BODY or status < 200:
            return b""
        if b"transfer-encoding: chunked" in head:
            return await self._chunks()
        at = head.find(b"content-length: ")
        if at < 0:
            return await self.reader.read(-1)
        return await self.reader.readexactly(int(head[at + 16 : head.index(b"\r\n", at)]))

    async def _chunks(self) -> bytes:
        body = b""
        while size := int(await self.reader.readline(), 16):
            piece = await self.reader.readexactly(size + 2)
            body = piece[:-2] if len(body) > PIECE else body + piece[:-2]
        await self.reader.readline()
        return body

    def close(self) -> None:
        self.writer.close()


async def push_steps(target: Target) -> None:
    """One client: the steps again and again, on one connection while it lasts."""
    line = None
    while True:
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                line = line or await target.connect()
                is_kept = await _once(target, line)
        except TimeoutError:
            target.tally["hung up"] += 1
            is_kept = False
        except (OSError, EOFError, ValueError) as exc:
            target.tally[type(exc).__name__] += 1
            is_kept = False
            await asyncio.sleep(0.01)
        if line is not None and (target.push.is_new or not is_kept):
            line.close()
            line = None


async def _once(target: Target, line: Line) -> bool:
    """Whether the connection can be used again."""
    values = target.values
    for step in target.push.steps:
        is_last = step is target.push.steps[-1]
        for _ in range(target.push.pipelined):
            await line.send(step.rendered(values))
        if target.push.is_cut and is_last:
            target.tally["cut" if await line.reader.read(1_000) else "closed"] += 1
            return False
        for _ in range(target.push.pipelined):
            status, _, body = await line.answer(step.method)
            if is_last or status >= 400:
                target.tally[str(status) if is_last else f"{status} before"] += 1
        if status >= 400 and not is_last:
            return True
        if step.gives:
            values[step.gives] = str(json.loads(body)["id"])
    return not line.reader.at_eof() and step.version == "1.1"


# What no client library does. Each function is one client.


async def half_open(target: Target) -> None:
    """Half of a head, and then nothing."""
    await _hold(target, b"GET /v1/jobs HTTP/1.1\r\nhost: loc", pause_seconds=None)


async def idle(target: Target) -> None:
    """A request, and then a connection that is kept."""
    await _hold(target, Step("GET", "/v1/jobs").rendered(target.values)[0], pause_seconds=None)


async def trickled_head(target: Target) -> None:
    await _hold(target, b"GET /v1/jobs HTTP/1.1\r\nx: ", pause_seconds=1.0)


async def trickled_body(target: Target) -> None:
    head = Step("POST", "/v1/jobs", headers={"content-length": "900000"}).rendered(target.values)[0]
    await _hold(target, head, pause_seconds=1.0)


async def trickled_upload(target: Target) -> None:
    headers = {"content-length": "9000000", "content-type": "multipart/form-data; boundary=x"}
    head = Step("POST", "/v1/files", headers=headers).rendered(target.values)[0]
    part = b'--x\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n'
    await _hold(target, head + part, pause_seconds=1.0)


async def _hold(target: Target, begin: bytes, *, pause_seconds: float | None) -> None:
    """Send `begin`, and a byte after each pause, until the server closes the connection."""
    while True:
        with suppress(OSError):
            line = await target.connect()
            target.tally["opened"] += 1
            await line.send([begin])
            while pause_seconds is not None and not line.reader.at_eof():
                await asyncio.sleep(pause_seconds)
                await line.send([b"a"])
            while await line.reader.read(PIECE):
                target.tally["answered"] += 1
            line.close()
        target.tally["closed"] += 1
        await asyncio.sleep(0.1)


async def unread(target: Target) -> None:
    """Ask for a large file a hundred times, and read nothing."""
    step = Step("GET", "/v1/files/@large_file_id@/content")
    while True:
        with suppress(OSError, TimeoutError):
            line = await target.connect()
            line.reader._transport.pause_reading()  # type: ignore[attr-defined]
            async with asyncio.timeout(PATIENCE_SECONDS):
                await line.send(step.rendered(target.values)[0] for _ in range(100))
                target.tally["asked"] += 1
                await asyncio.sleep(PATIENCE_SECONDS)
            line.close()


async def connections(target: Target) -> None:
    """Opened and closed, without a request."""
    while True:
        with suppress(OSError):
            (await target.connect()).close()
            target.tally["opened"] += 1


async def socket_responses(target: Target) -> None:
    """A WebSocket with one response after the other."""
    headers = {
        "upgrade": "websocket", "connection": "upgrade", "sec-websocket-version": "13",
        "sec-websocket-key": "AAAAAAAAAAAAAAAAAAAAAA==",
    }  # fmt: skip
    hello = Step("GET", "/v1/responses", headers=headers)
    while True:
        with suppress(OSError, EOFError, TimeoutError):
            line = await target.connect()
            async with asyncio.timeout(PATIENCE_SECONDS):
                await line.send(hello.rendered(target.values))
                status, *_ = await line.answer("GET")
                target.tally[str(status)] += 1
                for _ in range(20):
                    await line.send([_frame(filled(target.push.steps[0].body or "", target.values))])
                    target.tally["asked"] += 1
                while await line.reader.read(PIECE):
                    pass
            line.close()


def _frame(text: str) -> bytes:
    """Masked, by zeros."""
    payload = text.replace("@unique@", str(random.random())).encode()
    return b"\x81\xfe" + len(payload).to_bytes(2, "big") + b"\0\0\0\0" + payload


WILD: dict[str, Callable[[Target], Coroutine[Any, Any, None]]] = {
    function.__name__: function
    for function in (
        half_open,
        idle,
        trickled_head,
        trickled_body,
        trickled_upload,
        unread,
        connections,
        socket_responses,
    )
}


async def flood(url: str, push: Push) -> None:
    parts = urlsplit(url)
    target = Target(parts.hostname or "", parts.port or 80, push)
    act: Callable[[Target], Coroutine[Any, Any, None]] = WILD[push.wild] if push.wild else push_steps
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    tasks = [asyncio.create_task(act(target)) for _ in range(push.clients)]
    over = asyncio.create_task(ended.wait())
    await asyncio.wait([over, *tasks], return_when=asyncio.FIRST_COMPLETED)
    failed = [task.exception() for task in tasks if task.done() and not task.cancelled()]
    print(json.dumps({"answers": target.tally, "failed": repr(failed[0]) if failed else None}), flush=True)
    os._exit(0)  # hundreds of connections need not be closed one by one


if __name__ == "__main__":
    uvloop.run(flood(sys.argv[1], Push.loaded(sys.stdin.readline())))
