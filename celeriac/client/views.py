"""What the client returns: jobs as they were when they were read, and the events of their streams."""

import base64
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Self

from celeriac.client.answers import items_of, optional_object, text_of

TERMINAL_STATUSES = frozenset({"completed", "failed", "cancelled", "expired"})
TERMINAL_EVENTS = frozenset({f"job.{status}" for status in TERMINAL_STATUSES})


@dataclass(frozen=True, slots=True)
class JobSnapshot:
    """A job as it was when it was read. `raw` is the API's whole answer; its schema is `JobView` at /docs."""

    id: str
    status: str  # queued, in_progress, completed, failed, cancelled, expired
    model: str
    text: str  # of the first choice; what is committed so far if it was cancelled or has expired
    texts: tuple[str, ...]  # of all choices
    usage: Mapping[str, int]  # empty until the job has ended
    error: Mapping[str, Any] | None  # code, message, type, retryable
    metadata: Mapping[str, str]
    raw: Mapping[str, Any]

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> Self:
        output = optional_object(raw, "output")
        choices = items_of(output, "choices") if output.get("choices") else []
        return cls(
            id=text_of(raw, "id"),
            status=text_of(raw, "status"),
            model=text_of(raw, "model"),
            text=text_of(output, "text") if output.get("text") else "",
            texts=tuple(text_of(choice, "text") for choice in choices),
            usage=optional_object(raw, "usage"),
            error=optional_object(raw, "error") or None,
            metadata=optional_object(raw, "metadata"),
            raw=raw,
        )

    @property
    def has_ended(self) -> bool:
        return self.status in TERMINAL_STATUSES

    @property
    def created_at(self) -> datetime:
        return datetime.fromisoformat(self.raw["created_at"])

    @property
    def embeddings(self) -> list[Sequence[float]]:
        """The vectors of an embedding job, one per input, in order."""
        vectors = (self.raw.get("output") or {}).get("embeddings", ())
        return [array("f", base64.b64decode(vector)) for vector in vectors]


@dataclass(frozen=True, slots=True)
class QueueUpdate:
    """Where a job stands. Fields are None where the API cannot tell, and once the job has started."""

    status: str
    position: int | None = None  # jobs of the same model that come first
    eta_seconds: float | None = None  # until it starts
    waiting_for: str | None = None

    @classmethod
    def of(cls, job: JobSnapshot) -> Self:
        queue = optional_object(job.raw, "queue")
        return cls(job.status, queue.get("position"), queue.get("eta_seconds"), queue.get("waiting_for"))


@dataclass(frozen=True, slots=True)
class StreamEvent:
    """One server-sent event. `id` is the cursor for resuming after it."""

    name: str
    data: dict[str, Any]
    id: str | None

    @property
    def is_terminal(self) -> bool:
        return self.name in TERMINAL_EVENTS

    @property
    def text(self) -> str:
        """The new text of the first choice; empty for all other events."""
        is_delta = self.name == "output.delta" and self.data.get("index") == 0
        return str(self.data.get("text", "")) if is_delta else ""


@dataclass(frozen=True, slots=True)
class JobPage:
    """A page of jobs. `next_page` is the `after` of the following one; None on the last page."""

    jobs: tuple[JobSnapshot, ...]
    next_page: str | None

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> Self:
        next_page = text_of(raw, "last_id") if raw.get("has_more") else None
        return cls(tuple(map(JobSnapshot.of, items_of(raw, "data"))), next_page)

    def __iter__(self) -> Iterator[JobSnapshot]:
        return iter(self.jobs)


@dataclass(frozen=True, slots=True)
class BatchSnapshot:
    """A batch as it was when it was read. `raw` is the API's whole answer."""

    id: str
    status: str  # validating, in_progress, finalizing, completed, failed, expired, cancelling, cancelled
    num_lines: int
    num_completed: int
    num_failed: int
    output_file_id: str | None
    error_file_id: str | None
    raw: Mapping[str, Any]

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> Self:
        counts = optional_object(raw, "request_counts")
        return cls(
            id=text_of(raw, "id"),
            status=text_of(raw, "status"),
            num_lines=counts.get("total", 0),
            num_completed=counts.get("completed", 0),
            num_failed=counts.get("failed", 0),
            output_file_id=raw.get("output_file_id"),
            error_file_id=raw.get("error_file_id"),
            raw=raw,
        )

    @property
    def has_ended(self) -> bool:
        return self.status in TERMINAL_STATUSES
