"""Cancellations that a worker was asked for, on their way to SQL.

Whoever may use Celery's remote control can ask for any number. Those that come while one transaction waits for its turn
or runs go together into the next, so a storm of them does not hold up the commits of running jobs.
"""

import logging
from collections.abc import Callable, Sequence
from uuid import UUID

from gpu_worker.threads import Answer, StorageThread

log = logging.getLogger(__name__)

MAX_AT_ONCE = 500  # in one transaction, which locks their rows


class Cancels:
    """Runner's thread only. `write` cancels jobs in SQL."""

    def __init__(self, thread: StorageThread, write: Callable[[Sequence[UUID]], None]) -> None:
        self._storage_thread = thread
        self._write = write
        self._waiting: dict[UUID, None] = {}
        self._is_writing = False

    def add(self, job_ids: Sequence[UUID]) -> None:
        self._waiting.update(dict.fromkeys(job_ids))
        self._go_on()

    def _go_on(self) -> None:
        if self._is_writing or not self._waiting:
            return
        job_ids = list(self._waiting)[:MAX_AT_ONCE]
        for job_id in job_ids:
            del self._waiting[job_id]
        self._is_writing = True
        self._storage_thread.submit(lambda is_repeated: self._write(job_ids), self._on_done, self._on_error)

    def _on_done(self, answer: Answer[None]) -> None:
        self._is_writing = False
        self._go_on()

    def _on_error(self, exc: Exception) -> None:
        log.error("jobs could not be cancelled", exc_info=exc)
        self._is_writing = False
        self._go_on()
