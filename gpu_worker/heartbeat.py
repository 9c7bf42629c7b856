"""The worker's heartbeat in SQL: what dispatch windows, /health and admins go by, and how an admin's order comes in.

Belongs to the runner's thread.
"""

from collections.abc import Callable
from uuid import UUID

from domain.catalog import ModelSpec
from domain.workers import WorkerState
from gpu_worker.job_storage import JobStorage
from gpu_worker.storage_thread import StorageThread
from storage.workers import Orders, WorkerReport

REPORT_SECONDS = 2.0  # between two reports; an order is heard so late at most


class Heartbeat:
    """`on_answer(orders)` hears after each report what the worker is to do."""

    def __init__(
        self,
        storage: JobStorage,
        thread: StorageThread,
        *,
        spec: ModelSpec,
        owner: UUID,
        hostname: str,
        on_answer: Callable[[Orders], None],
    ) -> None:
        self._storage = storage
        self._thread = thread
        self._spec = spec
        self._owner = owner
        self._hostname = hostname
        self._on_answer = on_answer
        self._due_at = 0.0
        self._is_under_way = False
        self._told: WorkerState | None = None

    def beat_soon(self) -> None:
        """An order was changed: hear of it with the next turn."""
        self._due_at = 0.0

    def beat(self, now: float, state: WorkerState, *, num_running: int, tokens_per_second: float) -> None:
        """Report, if it is time to or the state is news. One at a time: an answer is obeyed before the next report."""
        if self._is_under_way or (now < self._due_at and state is self._told):
            return
        self._due_at, self._is_under_way, self._told = now + REPORT_SECONDS, True, state
        report = WorkerReport(
            id=self._owner,
            hostname=self._hostname,
            model=self._spec.id,
            max_num_seqs=self._spec.max_num_seqs,
            num_running=num_running,
            tokens_per_second=tokens_per_second,
            model_revision=self._storage.model_revision,
            state=state,
        )
        self._thread.submit(
            lambda is_repeated: self._storage.heartbeat(report),
            lambda answer: self._end(answer.value),
            lambda exc: self._end(None),
        )

    def _end(self, orders: Orders | None) -> None:
        self._is_under_way = False
        if orders is not None:
            self._on_answer(orders)
