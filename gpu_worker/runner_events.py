"""What a JobRunner tells of its jobs and of itself."""

from dataclasses import dataclass
from enum import StrEnum
from uuid import UUID

from domain.jobs import JobStatus
from domain.workers import WorkerState


class RunnerEventKind(StrEnum):
    CLAIMED = "claimed"  # the SQL claim committed: ack the message, send task-started
    DROPPED = "dropped"  # no row to claim (done, cancelled, somebody else's): ack the message, forget it
    ENDED = "ended"  # terminal in SQL: send task-succeeded, task-failed or task-revoked by `status`
    REFUSED = "refused"  # no jobs are taken at the moment: put its message back into the queue, forget it
    RELEASED = "released"  # given back to SQL, or lost to another owner: forget it, no terminal Celery event of ours


@dataclass(frozen=True, slots=True)
class RunnerEvent:
    """What became of one job. Per job the order is CLAIMED, then ENDED or RELEASED; or DROPPED or REFUSED
    alone.

    Jobs that the runner claimed straight from SQL (no delivery) are reported too; the pool ignores ids it never
    offered. Is one of those offered after all, while it runs here, it is reported as CLAIMED again.
    """

    kind: RunnerEventKind
    job_id: UUID
    status: JobStatus | None = None  # of ENDED
    runtime_seconds: float = 0.0
    summary: str = ""  # of ENDED: "12 tokens, stop" or the error code; never text of the job


@dataclass(frozen=True, slots=True)
class WorkerFailure:
    """Why a worker cannot go on: one line, with what to do where that is known."""

    reason: str
    is_lasting: bool = False  # a worker that is started right away would fail in the same way


@dataclass(frozen=True, slots=True)
class RunnerStats:
    """Figures for Flower, /health and the credit rule; read from any thread."""

    max_num_seqs: int
    num_running: int  # claimed and not yet ended
    num_offered: int  # in hand, unclaimed
    is_engine_ready: bool
    state: WorkerState
    tokens_per_second: float
    engine: dict[str, float]
