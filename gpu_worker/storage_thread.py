"""One thread for everything that waits for SQL or Redis: calls run in order, each until the database has answered.

The order is what the runner relies on: a crash report comes after the last chunks that arrived before the crash, a
release after the commit it follows. While the database is away the queue stands still, and the engine runs on.
"""

import logging
import queue
from collections.abc import Callable
from dataclasses import dataclass
from threading import Event, Thread
from time import monotonic
from typing import Generic, TypeVar

from observability import describe_exception
from storage.database import OUTAGES

logger = logging.getLogger(__name__)

T = TypeVar("T")

FIRST_RETRY_SECONDS = 0.05
MAX_RETRY_SECONDS = 1.0
STOP_PATIENCE_SECONDS = 5.0  # how long the last calls may wait for a database that is away
HUNG_SECONDS = 5.0  # for the one call that is under way: a frozen server never answers


@dataclass(frozen=True, slots=True)
class Answer(Generic[T]):
    """What a call returned. `sent_at` is the monotonic time before its last try was sent."""

    value: T
    sent_at: float


class StorageThread:
    """`post` hands a callback back to the thread that owns this object."""

    def __init__(self, post: Callable[[Callable[[], None]], None]) -> None:
        self._post = post
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._stopping = Event()
        self._stop_deadline = float("inf")
        self._thread = Thread(target=self._run, name="job-storage", daemon=True)
        self.is_away = False  # the database does not answer at the moment

    def start(self) -> None:
        self._thread.start()

    def submit(
        self,
        call: Callable[[bool], T],
        on_done: Callable[[Answer[T]], None],
        on_error: Callable[[Exception], None] | None = None,
    ) -> None:
        """Run `call(is_repeated)` after all calls before it. `is_repeated` says that an earlier try may have taken
        effect although no answer came. `on_done` and `on_error` are posted; without the latter, errors are logged."""

        def run() -> None:
            try:
                answer = self._until_answered(call)
            except Exception as exc:
                self._report(exc, on_error)
            else:
                self._post(lambda: on_done(answer))

        self._calls.put(run)

    def stop(self) -> None:
        """End after the calls submitted so far; those that an outage holds up are given up after a while. Blocks."""
        self._stop_deadline = monotonic() + STOP_PATIENCE_SECONDS
        self._stopping.set()
        self._calls.put(None)
        self._thread.join(STOP_PATIENCE_SECONDS + HUNG_SECONDS)

    def _run(self) -> None:
        while (run := self._calls.get()) is not None:
            run()

    def _until_answered(self, call: Callable[[bool], T]) -> Answer[T]:
        wait_seconds, is_repeated = FIRST_RETRY_SECONDS, False
        while True:
            sent_at = monotonic()
            try:
                value = call(is_repeated)
            except OUTAGES as exc:
                if monotonic() > self._stop_deadline:
                    raise
                if not self.is_away:
                    logger.warning("the database does not answer, repeating: %s", describe_exception(exc))
                self.is_away = is_repeated = True
                self._wait(wait_seconds)
                wait_seconds = min(2 * wait_seconds, MAX_RETRY_SECONDS)
            else:
                if self.is_away:
                    logger.info("the database answers again")
                self.is_away = False
                return Answer(value, sent_at)

    def _wait(self, seconds: float) -> None:
        if self._stopping.wait(seconds):
            Event().wait(FIRST_RETRY_SECONDS)  # stopping: try more often

    def _report(self, exc: Exception, on_error: Callable[[Exception], None] | None) -> None:
        if on_error is None:
            logger.error("a storage call failed", exc_info=exc)
            return
        self._post(lambda: on_error(exc))
