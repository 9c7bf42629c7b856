"""What is known of jobs that have open streams, so that streams that begin beside them need not ask SQL.

Of thousands that arrive at once, the server accepts one in each turn of its loop. So reads that only those share who
ask while another runs have few askers each, and cost more than all else. A stream that begins with what is known is
like one that began when it was read: what has happened since was heard, and is in here, or was missed by both.

What is known of a job grows with each chunk that is heard and follows on the last one. Everything else that is heard
of the job ends it, and so does a gap, silence for KNOWN_SECONDS that no look at SQL has confirmed, and the end of the
job's last stream.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import monotonic
from typing import NamedTuple
from uuid import UUID

from domain.jobs import JobStatus
from domain.requests import TokenChunk
from storage.job_queries import CHUNKS_PER_READ, JobRecord, StreamState

KNOWN_SECONDS = 2.0  # more than the time between two looks for silent streams

NEAR_CHUNKS = 100  # between the positions of streams that share a read, which is as long for each of them


class LogPage(NamedTuple):
    """The state and the next chunks of a job from one snapshot, so that a terminal state comes with all its chunks. The
    state is None if the job was deleted."""

    state: StreamState | None
    chunks: Sequence[TokenChunk]

    @property
    def is_full(self) -> bool:
        """Whether there may be more chunks."""
        return len(self.chunks) == CHUNKS_PER_READ


@dataclass(slots=True)
class _Known:
    lowest: int  # its chunks are those after it, up to the last one that is committed
    state: StreamState
    chunks: list[TokenChunk]
    holds_at: float  # when it was read, or confirmed last
    used_at: float
    record: JobRecord | None = None
    page: LogPage | None = None  # made of it for streams, until the next chunk


class KnownJobs:
    """Of one process; to be used on its event loop only."""

    def __init__(self, version_of: Callable[[UUID], int | None]) -> None:
        """`version_of` is that of StreamReader."""
        self._version_of = version_of
        self._by_id: dict[UUID, _Known] = {}

    def keep_page(self, job_id: UUID, version: int | None, lowest: int, page: LogPage) -> None:
        """A page that was read after `lowest`; `version` is that of before it was asked for."""
        state = page.state
        if version is None or version != self._version_of(job_id) or state is None or state.status.is_terminal:
            return
        last = page.chunks[-1].sequence_number if page.chunks else lowest
        if page.is_full or last < state.committed_sequence_number:
            return  # there is more
        self.confirm(job_id, state)
        now, known = monotonic(), self._by_id.get(job_id)
        if known is None or known.lowest > lowest:
            self._by_id[job_id] = _Known(lowest, state, list(page.chunks), now, now)

    def keep_record(self, job_id: UUID, version: int | None, record: JobRecord) -> None:
        """Without the request and the result. `version` as above."""
        known = self._by_id.get(job_id)
        if known is None or version is None or version != self._version_of(job_id):
            return
        job, state = record.job, known.state
        is_same = (job.status, job.attempt) == (state.status, state.attempt)
        if not is_same or job.committed_sequence_number > state.committed_sequence_number:
            del self._by_id[job_id]  # a message was lost
            return
        known.record = record

    def page(self, job_id: UUID, *, after: int) -> tuple[LogPage, float] | None:
        """For a stream that begins after that chunk, and since when it holds. To be used once, as a stream that asks
        again has reason to doubt what it was told."""
        known = self._holding(job_id)
        if known is None or not known.lowest <= after <= known.lowest + max(NEAR_CHUNKS, len(known.chunks)):
            return None
        known.used_at = monotonic()
        if known.page is None:
            known.page = LogPage(known.state, tuple(known.chunks))
        return known.page, known.holds_at

    def record(self, job_id: UUID) -> tuple[JobRecord, StreamState] | None:
        """The job as it was read once, and its state now."""
        known = self._holding(job_id)
        return None if known is None or known.record is None else (known.record, known.state)

    def hear(self, job_id: UUID, chunk: TokenChunk | None) -> None:
        """`None`: something else than a chunk was heard."""
        known = self._by_id.get(job_id)
        if known is None:
            return
        number = known.state.committed_sequence_number
        if chunk is not None and chunk.sequence_number <= number and not chunk.is_reset:
            return  # it is in here
        is_next = chunk is not None and chunk.sequence_number == number + 1 and not chunk.is_reset
        has_room = len(known.chunks) < CHUNKS_PER_READ - 1
        if chunk is None or not is_next or not has_room or known.state.status is not JobStatus.IN_PROGRESS:
            del self._by_id[job_id]
            return
        known.chunks.append(chunk)
        known.state = replace(known.state, committed_sequence_number=chunk.sequence_number)
        known.holds_at, known.page = monotonic(), None

    def confirm(self, job_id: UUID, state: StreamState | None) -> None:
        """SQL has been looked at, and this is the job's state."""
        known = self._by_id.get(job_id)
        if known is None:
            return
        if (
            state is None
            or (state.status, state.attempt) != (known.state.status, known.state.attempt)
            or state.committed_sequence_number > known.state.committed_sequence_number
        ):
            del self._by_id[job_id]
        else:
            known.holds_at = monotonic()

    def forget(self, job_id: UUID) -> None:
        self._by_id.pop(job_id, None)

    def forget_unused(self) -> None:
        """What no stream has begun with for a while: chunks take memory."""
        since = monotonic() - KNOWN_SECONDS
        for job_id in [job_id for job_id, known in self._by_id.items() if known.used_at < since]:
            del self._by_id[job_id]

    def _holding(self, job_id: UUID) -> _Known | None:
        known = self._by_id.get(job_id)
        if known is None or self._version_of(job_id) is None or monotonic() - known.holds_at > KNOWN_SECONDS:
            return None
        return known
