"""Between the Celery side and the engine: claims deliveries, feeds the engine, and owns the thread that talks to SQL.

Nothing here runs on Celery's hub thread except the small thread-safe calls of `JobRunner`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from uuid import UUID

from domain.jobs import JobStatus


class RunnerEventKind(StrEnum):
    CLAIMED = "claimed"  # the SQL claim committed: ack the message, send task-started
    DROPPED = "dropped"  # no row to claim (done, cancelled, somebody else's): ack the message, forget it
    ENDED = "ended"  # terminal in SQL: send task-succeeded, task-failed or task-revoked by `status`
    RELEASED = "released"  # given back to SQL, or lost to another owner: forget it, no terminal Celery event of ours


@dataclass(frozen=True, slots=True)
class RunnerEvent:
    """What became of one job. Per job the order is CLAIMED, then ENDED or RELEASED; or DROPPED alone.
    Jobs that the runner claimed straight from SQL (no delivery) are reported too; the pool ignores ids it never offered."""

    kind: RunnerEventKind
    job_id: UUID
    status: JobStatus | None = None  # of ENDED
    runtime_seconds: float = 0.0
    summary: str = ""  # of ENDED: "12 tokens, stop" or the error code; never text of the job


@dataclass(frozen=True, slots=True)
class RunnerStats:
    """Figures for Flower, /health and the credit rule; read from any thread."""

    max_num_seqs: int
    num_running: int  # claimed and not yet ended
    num_offered: int  # in hand, unclaimed
    is_engine_ready: bool
    is_draining: bool
    tokens_per_second: float
    engine: dict[str, float]


class JobRunner:
    """One engine, one thread. Every method is thread-safe and returns at once; news comes through `on_event`, which is
    called on the runner's thread, in order."""

    def __init__(self, *, model: str, owner: UUID, hostname: str, on_event: Callable[[RunnerEvent], None]) -> None:
        raise NotImplementedError

    def start(self) -> None:
        """Start the engine process and the thread."""
        raise NotImplementedError

    def offer(self, job_id: UUID) -> None:
        """A delivery in hand. It is claimed, with all others that fit, as soon as the engine has room."""
        raise NotImplementedError

    def withdraw(self) -> list[UUID]:
        """Take back every offered, unclaimed job, in order of arrival; no event follows for them."""
        raise NotImplementedError

    def cancel(self, job_id: UUID) -> None:
        """Stop a running or offered job: the flag goes to SQL (whoever owns the job sees it), the engine hears at once."""
        raise NotImplementedError

    def begin_drain(self, *, release_after_seconds: float) -> None:
        """Claim nothing more; let running jobs end; release what still runs after the time given."""
        raise NotImplementedError

    def resume(self) -> None:
        """Undo begin_drain."""
        raise NotImplementedError

    def stop(self, *, release: bool) -> None:
        """End the thread and the engine process; with `release`, running jobs go back to the queue first. Blocks."""
        raise NotImplementedError

    @property
    def num_free(self) -> int:
        """Sequences the engine could take now, beyond those claimed. 0 while it is not ready or draining."""
        raise NotImplementedError

    def stats(self) -> RunnerStats:
        raise NotImplementedError
