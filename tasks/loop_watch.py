"""How late an event loop comes to its work, as a metric; and where it stands, in the log, when it stands still.

For every process that runs on asyncio. The beat is a timer of the loop; a thread beside it looks whether it comes.
"""

import asyncio
import logging
import sys
import threading
import traceback
from pathlib import PurePath
from time import monotonic
from types import FrameType
from typing import Self

from observability import event_loop_lag_seconds

log = logging.getLogger(__name__)

BEAT_SECONDS = 0.1
STALL_SECONDS = 0.25
MAX_FRAMES = 25


class LoopWatch:
    """Watches the loop that it is entered on, as an async context manager."""

    def __init__(self, *, stall_seconds: float = STALL_SECONDS) -> None:
        self._stall_seconds = stall_seconds
        self._due_at = 0.0  # of the next beat
        self._told_at = 0.0  # the beat whose stall was logged
        self._is_over = threading.Event()
        self._timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._thread_id = threading.get_ident()
        self._plan_beat()
        self._thread = threading.Thread(target=self._look, name="loop-watch", daemon=True)
        self._thread.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._is_over.set()
        if self._timer is not None:
            self._timer.cancel()

    def _plan_beat(self) -> None:
        self._due_at = monotonic() + BEAT_SECONDS
        self._timer = self._loop.call_later(BEAT_SECONDS, self._beat)

    def _beat(self) -> None:
        late_seconds = max(0.0, monotonic() - self._due_at)
        event_loop_lag_seconds.observe(late_seconds)
        if late_seconds > self._stall_seconds and self._told_at != self._due_at:
            # Code that never let go of the interpreter's lock kept the thread from looking, too.
            self._tell(late_seconds, "it was over before anybody could look")
        self._plan_beat()

    def _look(self) -> None:
        while not self._is_over.wait(BEAT_SECONDS):
            due_at = self._due_at
            late_seconds = monotonic() - due_at
            frame = sys._current_frames().get(self._thread_id)
            if late_seconds > self._stall_seconds and self._told_at != due_at and frame is not None:
                self._told_at = due_at
                self._tell(late_seconds, describe_stack(frame))

    def _tell(self, late_seconds: float, stack: str) -> None:
        log.warning("the event loop stands still", extra={"seconds_so_far": round(late_seconds, 3), "stack": stack})


def describe_stack(frame: FrameType) -> str:
    """Innermost first: files, lines and functions, and none of the values they work on."""
    summary = traceback.StackSummary.extract(traceback.walk_stack(frame), limit=MAX_FRAMES, lookup_lines=False)
    return " < ".join(f"{'/'.join(PurePath(one.filename).parts[-2:])}:{one.lineno} {one.name}" for one in summary)
