"""The GPU worker that `bench/consumer.py` measures: Celery as usual, but jobs end as soon as they start."""

import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import SimpleQueue
from uuid import UUID

from domain.jobs import JobStatus, WorkerState
from gpu_worker.app import app, models
from gpu_worker.pool import EnginePool
from gpu_worker.threads import RunnerEvent, RunnerEventKind, RunnerStats

__all__ = ["app"]

LEDGER = Path(os.environ["CONSUMER_BENCH_LEDGER"])


class NoOpRunner:
    """JobRunner's interface without engine and SQL. Every claim adds a line to the ledger: the ticket, and the
    monotonic time."""

    def __init__(self, *, on_event: Callable[[RunnerEvent], None], **_: object) -> None:
        self._on_event = on_event
        self._offered: SimpleQueue[UUID | None] = SimpleQueue()
        self._num_running = 0
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def offer(self, ticket_id: UUID) -> None:
        self._offered.put(ticket_id)

    def withdraw(self) -> list[UUID]:
        return []

    def cancel(self, job_id: UUID) -> None:
        """Does nothing: no job runs long enough."""

    def cancel_queued(self, job_ids: Sequence[UUID]) -> None:
        """Does nothing: there is no queue."""

    def begin_drain(self, *, release_after_seconds: float) -> None:
        """Does nothing: no job runs long enough."""

    def order_drain(self, *, release_after_seconds: float) -> None:
        """Does nothing: nobody orders a drain."""

    def order_resume(self) -> None:
        """Does nothing: nothing was drained."""

    def stop(self, *, release: bool) -> None:
        self._offered.put(None)
        self._thread.join()

    @property
    def num_free(self) -> int:
        return models[0].max_num_seqs - self._num_running

    def stats(self) -> RunnerStats:
        return RunnerStats(
            max_num_seqs=models[0].max_num_seqs,
            num_running=self._num_running,
            num_occupied=self._num_running,
            num_offered=self._offered.qsize(),
            is_engine_ready=True,
            state=WorkerState.READY,
            is_resting=False,
            tokens_per_second=0.0,
            engine={},
        )

    def _run(self) -> None:
        with LEDGER.open("a") as ledger:
            while (first := self._offered.get()) is not None:
                tickets = [first]
                while not self._offered.empty() and (ticket_id := self._offered.get()) is not None:
                    tickets.append(ticket_id)
                self._run_jobs(tickets)
                ledger.write("".join(f"{ticket_id} {time.monotonic()}\n" for ticket_id in tickets))
                ledger.flush()

    def _run_jobs(self, tickets: list[UUID]) -> None:
        """Each ticket finds a job, which is called like it."""
        self._num_running = len(tickets)
        for kind in (RunnerEventKind.CLAIMED, RunnerEventKind.SPENT):
            for ticket_id in tickets:
                self._on_event(RunnerEvent(kind, ticket_id))
        for job_id in tickets:
            self._on_event(
                RunnerEvent(RunnerEventKind.ENDED, job_id, status=JobStatus.COMPLETED, summary="0 tokens, stop")
            )
        self._num_running = 0


EnginePool.make_runner = NoOpRunner  # type: ignore[assignment]
