"""A GPU worker whose engine side is a small thread: `celery -A tests.integration.consumer_app worker`.

Celery, kombu and Redis are real. `LedgerRunner` stands for JobRunner and SQL together: queued jobs are files, and a
claim takes the oldest by moving its file, so that one of several workers gets it. What happened is written to one
ledger.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

from celery import signals

from domain.jobs import JobStatus, WorkerState, external_id, parse_id
from gpu_worker import consumer
from gpu_worker.app import app, models
from gpu_worker.pool import EnginePool
from gpu_worker.threads import RunnerEvent, RunnerEventKind, RunnerStats, WorkerFailure
from gpu_worker.transport import BulkChannel

__all__ = ["app"]

FOLDER = Path(os.environ["CONSUMER_TEST_FOLDER"])
JOB_SECONDS = float(os.environ.get("CONSUMER_TEST_JOB_SECONDS", "inf"))  # inf: until the test ends the job
FREEZES_FIRST_CHANNEL = "CONSUMER_TEST_FREEZE" in os.environ
STEP_SECONDS = 0.002


class LedgerRunner:
    """JobRunner's contract, on files."""

    def __init__(
        self,
        *,
        model: str,
        owner: UUID,
        hostname: str,
        on_event: Callable[[RunnerEvent], None],
        on_unhealthy: Callable[[WorkerFailure], None],
        memory: object,
    ) -> None:
        self._hostname = hostname
        self._on_event = on_event
        self._on_unhealthy = on_unhealthy
        self._lock = threading.RLock()
        self._tickets: dict[UUID, None] = {}
        self._started_at: dict[UUID, float] = {}
        self._cancelled: set[UUID] = set()
        self._is_draining = False
        self._release_at = float("inf")
        self._is_stopped = threading.Event()
        self._max_held = 0
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def offer(self, ticket_id: UUID) -> None:
        with self._lock:
            self._tickets[ticket_id] = None
            self._max_held = max(self._max_held, len(self._tickets) + len(self._started_at))

    def withdraw(self) -> list[UUID]:
        with self._lock:
            withdrawn, self._tickets = list(self._tickets), {}
            return withdrawn

    def cancel(self, job_id: UUID) -> None:
        with self._lock:
            self._cancelled.add(job_id)

    def stop_cancelled(self, job_id: UUID) -> None:
        self.cancel(job_id)

    def cancel_queued(self, job_ids: Sequence[UUID]) -> None:
        for job_id in job_ids:
            with contextlib.suppress(FileNotFoundError):
                (FOLDER / "queued" / external_id(job_id)).unlink()
                self._record("cancelled", job_id)

    def begin_drain(self, *, release_after_seconds: float) -> None:
        self._is_draining = True
        self._release_at = time.monotonic() + release_after_seconds

    def order_drain(self, *, release_after_seconds: float) -> None:
        self.begin_drain(release_after_seconds=release_after_seconds)
        for ticket_id in self.withdraw():
            self._tell(RunnerEventKind.REFUSED, ticket_id)

    def order_resume(self) -> None:
        self._is_draining, self._release_at = False, float("inf")

    def forget_failure(self) -> None:
        """Nothing has failed."""

    def stop(self, *, release: bool) -> None:
        self._is_stopped.set()
        self._thread.join()
        if release:
            self._release_all()

    @property
    def num_free(self) -> int:
        return 0 if self._is_draining or self._is_resting else models[0].max_num_seqs - len(self._started_at)

    @property
    def _is_resting(self) -> bool:
        return (FOLDER / "resting").exists()

    def stats(self) -> RunnerStats:
        return RunnerStats(
            max_num_seqs=models[0].max_num_seqs,
            num_running=len(self._started_at),
            num_occupied=len(self._started_at),
            num_offered=len(self._tickets),
            is_engine_ready=True,
            state=WorkerState.DRAINING if self._is_draining else WorkerState.READY,
            is_resting=self._is_resting,
            tokens_per_second=0.0,
            engine={"max_held": self._max_held},
        )

    def _run(self) -> None:
        while not self._is_stopped.wait(STEP_SECONDS):
            with self._lock:
                self._claim()
                self._end_due()
                if time.monotonic() > self._release_at:
                    self._release_all()
                if (FOLDER / "engine_is_broken").exists():
                    self._release_all()
                    self._on_unhealthy(WorkerFailure("the engine is broken"))
                    return

    def _claim(self) -> None:
        for ticket_id in self.withdraw() if self._is_resting else ():
            self._record("refused", ticket_id)
            self._tell(RunnerEventKind.REFUSED, ticket_id)
        while self._tickets and self.num_free > 0:
            job_id = self._oldest_queued()
            if job_id is not None:
                self._started_at[job_id] = time.monotonic()
                self._record("claimed", job_id)
                self._tell(RunnerEventKind.CLAIMED, job_id)
            ticket_id = next(iter(self._tickets))
            del self._tickets[ticket_id]
            self._tell(RunnerEventKind.SPENT, ticket_id)

    def _oldest_queued(self) -> UUID | None:
        for name in sorted(os.listdir(FOLDER / "queued")):
            with contextlib.suppress(FileNotFoundError):  # another worker was faster
                (FOLDER / "queued" / name).rename(FOLDER / "owned" / name)
                return parse_id(name)
        return None

    def _end_due(self) -> None:
        for job_id, started_at in list(self._started_at.items()):
            seconds = time.monotonic() - started_at
            status = self._status_after(job_id, seconds)
            if status is None:
                continue
            del self._started_at[job_id]
            self._record(status, job_id)
            self._tell(RunnerEventKind.ENDED, job_id, status=status, runtime_seconds=seconds, summary=f"a {status} job")

    def _status_after(self, job_id: UUID, seconds: float) -> JobStatus | None:
        if job_id in self._cancelled:
            return JobStatus.CANCELLED
        wish = FOLDER / "ends" / external_id(job_id)
        if wish.exists():
            return JobStatus(wish.read_text())
        return JobStatus.COMPLETED if seconds >= JOB_SECONDS or (FOLDER / "end_all").exists() else None

    def _release_all(self) -> None:
        for job_id in list(self._started_at):
            del self._started_at[job_id]
            (FOLDER / "owned" / external_id(job_id)).rename(FOLDER / "queued" / external_id(job_id))
            self._record("released", job_id)
            self._tell(RunnerEventKind.RELEASED, job_id)

    def _record(self, what: str, job_id: UUID) -> None:
        record(what, external_id(job_id), self._hostname)

    def _tell(self, kind: RunnerEventKind, job_id: UUID, **facts: Any) -> None:
        self._on_event(RunnerEvent(kind, job_id, **facts))


def record(*words: str) -> None:
    """One line in the ledger; short appends are atomic, also between processes."""
    with (FOLDER / "ledger").open("a") as ledger:
        ledger.write(" ".join(words) + "\n")


@signals.worker_ready.connect
def _record_ready(sender: Any, **_: Any) -> None:
    record("ready", sender.hostname)


@app.task(name="test.housekeeping")
def housekeeping() -> None:
    """A small task that runs inline on the worker's event loop."""
    record("housekeeping")


def _freeze_first_channel() -> None:
    """The first channel connects and listens, but never takes a message: what every stalled consumer looks like."""
    take = BulkChannel.take
    frozen: list[BulkChannel] = []

    def take_unless_first(channel: BulkChannel, queues: Sequence[str]) -> int:
        frozen.append(channel)
        return 0 if channel is frozen[0] else take(channel, queues)

    BulkChannel.take = take_unless_first  # type: ignore[assignment, method-assign]
    consumer.STALL_SECONDS = 1.5


EnginePool.make_runner = LedgerRunner  # type: ignore[assignment]
if FREEZES_FIRST_CHANNEL:
    _freeze_first_channel()
