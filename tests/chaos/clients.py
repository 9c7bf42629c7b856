"""Clients that submit jobs, watch their streams, break off and come back, and write down what they saw.

Nothing here asserts: `checker` judges the histories afterwards. A client trusts nobody but its own notes.
"""

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx

from celeriac.client.views import TERMINAL_EVENTS, StreamEvent

PATIENCE_SECONDS = 120.0  # for an answer to a submission, over all its tries
SILENCE_SECONDS = 20.0  # of a stream, heartbeats included, until its client gives the connection up
RETRY_SECONDS = 0.3
PASSING_STATUSES = frozenset({429, 500, 502, 503, 504})

How = Literal["start", "last-event-id", "starting-after", "snapshot"]


@dataclass(slots=True)
class Delta:
    """One chunk as it arrived."""

    number: int
    text: str
    at: float


@dataclass(slots=True)
class Connection:
    """One connection to a stream, from its request to its end. `snapshot` is the text of the snapshot it began with."""

    how: How
    cursor: int
    opened_at: float
    url: str
    deltas: list[Delta] = field(default_factory=list)
    snapshot: tuple[int, str] | None = None
    snapshot_at: float = 0.0
    ended: str = "open"  # left (by the client), dropped, closed (by the server without a terminal event), terminal
    ended_at: float = 0.0


@dataclass(slots=True)
class History:
    """What one client knows of one job."""

    key: str
    body: dict[str, Any]
    began_at: float = 0.0
    num_tries: int = 0
    accepted_at: float | None = None
    job_id: str | None = None
    connections: list[Connection] = field(default_factory=list)
    refusals: list[tuple[float, int, str]] = field(default_factory=list)  # at, status, code
    ends_seen: list[dict[str, Any]] = field(default_factory=list)  # the job as each terminal event or answer showed it
    ended_at: float | None = None  # when the client first saw the end
    cancelled_at: float | None = None

    @property
    def end(self) -> dict[str, Any] | None:
        return self.ends_seen[0] if self.ends_seen else None

    def last_number(self) -> int:
        """The highest sequence number seen so far."""
        numbers = [connection.deltas[-1].number for connection in self.connections if connection.deltas]
        snapshots = [connection.snapshot[0] for connection in self.connections if connection.snapshot]
        return max([0, *numbers, *snapshots])


class Clients:
    """All clients of a run, on one connection pool. `urls` are the APIs; each request goes to any of them."""

    def __init__(self, urls: Sequence[str], *, seed: int = 0) -> None:
        self.histories: list[History] = []
        self.num_reconnects = 0
        self._urls = list(urls)
        self._random = random.Random(seed)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=32)
        timeout = httpx.Timeout(SILENCE_SECONDS, connect=2.0)
        self._http = httpx.AsyncClient(limits=limits, timeout=timeout, trust_env=False)

    async def close(self) -> None:
        await self._http.aclose()

    def plan(self, body: dict[str, Any]) -> History:
        """A job that is going to be submitted."""
        history = History(key=f"chaos-{len(self.histories)}-{self._random.getrandbits(64):016x}", body=body)
        self.histories.append(history)
        return history

    async def submit(self, history: History) -> bool:
        """Until it is accepted; False when no answer came for too long, or it was refused for good."""
        history.began_at = time.time()
        while time.time() < history.began_at + PATIENCE_SECONDS:
            history.num_tries += 1
            try:
                response = await self._http.post(
                    f"{self._any_url()}/v1/jobs", json=history.body, headers={"idempotency-key": history.key}
                )
            except httpx.HTTPError:
                await asyncio.sleep(RETRY_SECONDS)
                continue
            if response.status_code in (200, 202):
                history.accepted_at, history.job_id = time.time(), response.json()["id"]
                return True
            self._note_refusal(history, response)
            if response.status_code not in PASSING_STATUSES:
                return False
            await asyncio.sleep(RETRY_SECONDS)
        return False

    async def follow(self, history: History, *, breaks: Sequence[int] = (), hows: Sequence[How] = ("start",)) -> None:
        """Watch to the end. The client breaks off after so many deltas of a connection, one connection after another,
        and comes back by the next of `hows`, whose last is also how it comes back when it is dropped."""
        plan = list(breaks)
        for number in range(10_000):
            if history.ends_seen:
                return
            if number:
                self.num_reconnects += 1
            how = hows[min(number, len(hows) - 1)]
            connection = self._begin(history, how)
            await self._watch(history, connection, leave_after=plan.pop(0) if plan else None)
            if connection.ended in ("dropped", "closed"):
                await asyncio.sleep(RETRY_SECONDS * self._random.uniform(0.2, 1))

    async def replay(self, history: History, how: How, cursor: int) -> None:
        """Watch a finished job again, from anywhere."""
        for _ in range(10):
            connection = self._begin(history, how, cursor)
            self.num_reconnects += 1
            await self._watch(history, connection, leave_after=None)
            if connection.ended == "terminal":
                return
            await asyncio.sleep(RETRY_SECONDS)

    async def look(self, history: History) -> dict[str, Any] | None:
        """One poll; None while no answer comes."""
        try:
            response = await self._http.get(f"{self._any_url()}/v1/jobs/{history.job_id}")
        except httpx.HTTPError:
            return None
        if response.status_code != 200:
            self._note_refusal(history, response)
            return None
        view: dict[str, Any] = response.json()
        if view["finished_at"] is not None:
            self._note_end(history, view)
        return view

    async def cancel(self, history: History) -> None:
        """Ask once; whether it was heard does not matter."""
        history.cancelled_at = time.time()
        try:
            await self._http.post(f"{self._any_url()}/v1/jobs/{history.job_id}/cancel")
        except httpx.HTTPError:
            return

    # One connection

    def _begin(self, history: History, how: How, cursor: int | None = None) -> Connection:
        cursor = history.last_number() if cursor is None else cursor
        if cursor == 0 and how in ("last-event-id", "starting-after"):
            how = "start"
        cursor = 0 if how in ("start", "snapshot") else cursor
        connection = Connection(how, cursor, time.time(), self._any_url())
        history.connections.append(connection)
        return connection

    async def _watch(self, history: History, connection: Connection, *, leave_after: int | None) -> None:
        try:
            async for event in self._events(history, connection):
                self._note_event(history, connection, event)
                if event.is_terminal:
                    connection.ended = "terminal"
                    break
                if leave_after is not None and len(connection.deltas) >= leave_after:
                    connection.ended = "left"
                    break
            else:
                connection.ended = "closed"
        except (httpx.HTTPError, ValueError):  # ValueError: an event cut in half
            connection.ended = "dropped"
        connection.ended_at = time.time()

    async def _events(self, history: History, connection: Connection) -> AsyncIterator[StreamEvent]:
        url = f"{connection.url}/v1/jobs/{history.job_id}/events"
        headers = {"last-event-id": str(connection.cursor)} if connection.how == "last-event-id" else {}
        parameters: dict[str, str] = {}
        if connection.how == "starting-after":
            parameters = {"starting_after": str(connection.cursor)}
        elif connection.how == "snapshot":
            parameters = {"from": "snapshot"}
        async with self._http.stream("GET", url, params=parameters, headers=headers) as response:
            if response.status_code == 204:  # its last event was seen already
                return
            if response.status_code != 200:
                await response.aread()
                self._note_refusal(history, response)
                return
            async for event in parse_events(response.aiter_bytes()):
                yield event

    def _note_event(self, history: History, connection: Connection, event: StreamEvent) -> None:
        if event.name == "output.delta":
            delta = Delta(event.data["sequence_number"], event.data["text"], time.time())
            connection.deltas.append(delta)
        elif event.name == "job.snapshot":
            text = "".join(choice["text"] for choice in event.data["choices"])
            connection.snapshot, connection.snapshot_at = (event.data["sequence_number"], text), time.time()
        elif event.name in TERMINAL_EVENTS:
            self._note_end(history, event.data)

    def _note_end(self, history: History, view: dict[str, Any]) -> None:
        history.ends_seen.append(view)
        history.ended_at = history.ended_at or time.time()

    def _note_refusal(self, history: History, response: httpx.Response) -> None:
        try:
            code = str(response.json()["error"]["code"])
        except (ValueError, KeyError, TypeError):
            code = "not in our shape"
        history.refusals.append((time.time(), response.status_code, code))

    def _any_url(self) -> str:
        return self._random.choice(self._urls)


async def parse_events(parts: AsyncIterator[bytes]) -> AsyncIterator[StreamEvent]:
    """Server-sent events out of the bytes of a response. Raises ValueError for one that is no JSON."""
    buffer = b""
    async for part in parts:
        buffer += part
        *blocks, buffer = buffer.split(b"\n\n")
        for block in blocks:
            fields = [line.partition(b": ") for line in block.split(b"\n") if line and not line.startswith(b":")]
            value_by_name = {name: value for name, _, value in fields}
            if b"data" in value_by_name:
                event_id = value_by_name.get(b"id")
                yield StreamEvent(
                    value_by_name.get(b"event", b"message").decode(),
                    json.loads(value_by_name[b"data"]),
                    event_id.decode() if event_id is not None else None,
                )
