"""Whether requests may be sent to a server that may be away or busy.

A failure closes the gate for a while that doubles with each further one. Then one request is tried, and if the server
accepts it, the gate is open again. Meanwhile no job is charged for anything.
"""

import random
from dataclasses import dataclass

from gpu_worker.engine.remote.answers import Fault, ServerFailure

FIRST_WAIT_SECONDS = 0.5
MAX_WAIT_SECONDS = 15.0


@dataclass(slots=True)
class Gate:
    """All times are monotonic seconds."""

    reason: str = ""  # why it is closed; empty if it is open
    is_away: bool = False  # closed because the server does not answer, which a probe finds out
    opens_at: float = 0.0
    _num_failures: int = 0
    _closed_at: float = 0.0

    @property
    def is_open(self) -> bool:
        return not self.reason

    def room(self, now: float, *, num_under_way: int) -> int | None:
        """How many requests may be sent now; None for any number. `num_under_way` counts those that the server has not
        accepted yet."""
        if self.is_open:
            return None
        return 0 if self.is_away or now < self.opens_at else max(0, 1 - num_under_way)

    def close(self, failure: ServerFailure, now: float, *, sent_at: float) -> bool:
        """Returns whether the reason is a new one. The failure of a request that was sent before the gate was closed
        tells nothing new."""
        if not self.is_open and sent_at < self._closed_at:
            return False
        is_new = failure.what != self.reason
        self._num_failures += 1
        wait_seconds = min(FIRST_WAIT_SECONDS * 2 ** (self._num_failures - 1), MAX_WAIT_SECONDS)
        wait_seconds *= random.uniform(0.5, 1.0)  # several workers should not come back at the same moment
        self.opens_at = now + max(wait_seconds, failure.retry_after_seconds or 0.0)
        self.reason, self.is_away, self._closed_at = failure.what, failure.fault is Fault.AWAY, now
        return is_new

    def note_answer(self, now: float) -> None:
        """The server answers a probe: try one request."""
        if self.is_away:
            self.is_away, self.opens_at = False, now

    def open(self) -> None:
        """The server has accepted a request."""
        self.reason, self.is_away, self._num_failures = "", False, 0
