"""How long a reader whose connection was cut stands still, and for how much of it there was something to read.

Raw is from the cut to the next thing that this client had not seen: a chunk, a snapshot that holds one, the end. `ours`
begins no sooner than SQL had it: a job that waits for its next attempt stalls no stream; and it leaves out the time in
which other injected faults kept the database away, or every API. What remains is the client's way back, and the delay
of the stream.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import psycopg

from domain.jobs import external_id
from tests.chaos.clients import Connection, History

#: What the server is to note from its next start on. A worker may be paused between a chunk's statement and its commit.
INSTALL = "ALTER SYSTEM SET track_commit_timestamp = on"
COMMITTED_AT = "extract(epoch FROM pg_xact_commit_timestamp(xmin))::float8"


@dataclass(frozen=True, slots=True)
class Written:
    """When what was committed: chunks by number, and the end, in seconds since the epoch."""

    chunks: Mapping[int, float]
    end: float | None

    def after(self, number: int) -> float | None:
        """When there was first something beyond this chunk."""
        return self.chunks.get(number + 1, self.end)


@dataclass(frozen=True, slots=True)
class Stall:
    """Of a client that was cut off at `cut_at`, having seen all before what SQL had at `ready_at`."""

    job_id: str
    cut_at: float
    heard_at: float
    ready_at: float
    ways_back: tuple[Connection, ...] = ()  # the connections that it took, the last of which told

    @property
    def raw(self) -> float:
        return self.heard_at - self.cut_at

    def ours(self, away: Sequence[tuple[float, float]] = ()) -> float:
        """Without the times in `away`, each from when to when."""
        begins_at, total = min(max(self.cut_at, self.ready_at), self.heard_at), 0.0
        for since, until in [*sorted(away), (self.heard_at, self.heard_at)]:
            total += max(0.0, min(since, self.heard_at) - begins_at)
            begins_at = max(begins_at, until)
        return total


def install(connection: "psycopg.Connection[Any]") -> None:
    """PostgreSQL must be restarted after it."""
    connection.execute(INSTALL)


def read_written(connection: "psycopg.Connection[Any]") -> dict[str, Written]:
    """By job."""
    chunks: dict[UUID, dict[int, float]] = {}
    for job_id, number, at in connection.execute(f"SELECT job_id, sequence_number, {COMMITTED_AT} FROM job_chunks"):
        chunks.setdefault(job_id, {})[number] = at
    ends = connection.execute(f"SELECT id, {COMMITTED_AT} FROM jobs WHERE finished_at IS NOT NULL")
    return {external_id(job_id): Written(chunks.get(job_id, {}), end) for job_id, end in ends}


def find_stalls(histories: Iterable[History], written: Mapping[str, Written]) -> Iterator[Stall]:
    for history in histories:
        if history.job_id is not None and history.job_id in written:
            yield from _stalls_of(history, history.job_id, written[history.job_id])


def _stalls_of(history: History, job_id: str, written: Written) -> Iterator[Stall]:
    seen, cut_at, ways_back = 0, None, list[Connection]()
    for connection in history.connections:
        heard_at = _first_news(connection, seen)
        ways_back.append(connection)
        if cut_at is not None and heard_at is not None:
            ready_at = written.after(seen)
            yield Stall(job_id, cut_at, heard_at, cut_at if ready_at is None else ready_at, tuple(ways_back))
            cut_at = None
        seen = max([seen, *_numbers(connection)])
        if connection.ended == "dropped" and cut_at is None:
            cut_at, ways_back = connection.ended_at, []


def _first_news(connection: Connection, seen: int) -> float | None:
    """When this connection first told more than what was `seen`; None where it did not."""
    if connection.snapshot is not None and connection.snapshot[0] > seen:
        return connection.snapshot_at
    first = next((delta.at for delta in connection.deltas if delta.number > seen), None)
    return connection.ended_at if first is None and connection.ended == "terminal" else first


def _numbers(connection: Connection) -> list[int]:
    numbers = [delta.number for delta in connection.deltas[-1:]]
    return [*numbers, connection.snapshot[0]] if connection.snapshot is not None else numbers
