"""JSON logging with the ids of what is being worked on, and a watch on event loops.

Never in a log: a prompt, an output, a key. Only ids, lengths, counts and codes. Exceptions are logged with
their first line alone, because database and validation errors repeat the values they choked on in the lines below it.

How late an event loop comes to its work, as a metric; and where it stands, in the log, when it stands still.

For every process that runs on asyncio. The beat is a timer of the loop; a thread beside it looks whether it comes.
"""

import asyncio
import contextlib
import logging
import sys
import threading
import traceback
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import PurePath
from time import monotonic
from types import FrameType, TracebackType
from typing import Literal, Self

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.orjson import OrjsonFormatter

from metrics import event_loop_lag_seconds

log = logging.getLogger(__name__)

job_id_context: ContextVar[str | None] = ContextVar("job_id", default=None)

request_id_context: ContextVar[str | None] = ContextVar("request_id", default=None)

#: The ids of jobs that a request is having accepted, latest last: what is known of them if it ends before its answer.
submitted_job_ids: ContextVar[list[str] | None] = ContextVar("submitted_job_ids", default=None)

_MAX_EXCEPTION_CHARS = 300

_ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]


def note_submitted(job_id: str) -> None:
    if (job_ids := submitted_job_ids.get()) is not None:
        job_ids.append(job_id)


@contextlib.contextmanager
def job_context(job_id: str) -> Iterator[None]:
    """Every log line inside names this job (the external id)."""
    token = job_id_context.set(job_id)
    try:
        yield
    finally:
        job_id_context.reset(token)


def configure_logging(level: str, log_format: Literal["json", "text"]) -> None:
    """Send all logging of this process to stderr in one format. Repeatable: the last call wins."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_add_context)
    handler.addFilter(_shorten)
    handler.setFormatter(_json_formatter() if log_format == "json" else _TextFormatter(_TEXT_FORMAT))
    root = logging.getLogger()
    root.handlers = [handler]
    logging.captureWarnings(True)
    root.setLevel(level)
    # Their INFO lines repeat ours or fire per request.
    for name in ("uvicorn.access", "httpx", "httpcore", "sqlalchemy.engine"):
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))


def describe_exception(exc: BaseException) -> str:
    """`Type: first line`, short enough and without the values that the further lines of a database error quote."""
    first_line = str(exc).partition("\n")[0][:_MAX_EXCEPTION_CHARS]
    return f"{type(exc).__name__}: {first_line}" if first_line else type(exc).__name__


def _shorten(record: logging.LogRecord) -> bool:
    """One line in the log for each: Celery and others break theirs."""
    message = record.getMessage()
    if "\n" in message:
        record.msg, record.args = " ".join(message.split()), ()
    return True


_TEXT_FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"


def _add_context(record: logging.LogRecord) -> bool:
    ids = {"job_id": job_id_context.get(), "request_id": request_id_context.get()}
    for name, value in ids.items():
        if value is not None and not hasattr(record, name):
            setattr(record, name, value)
    return True


def _format_exception(exc_info: _ExcInfo) -> str:
    exc = exc_info[1]
    if exc is None:
        return ""
    frames = "".join(traceback.format_tb(exc.__traceback__))
    cause = exc.__cause__
    because = f"\ncaused by {describe_exception(cause)}" if cause is not None else ""
    return f"{frames}{describe_exception(exc)}{because}"


class _TextFormatter(logging.Formatter):
    """As the JSON lines, everything that a line was given is in it: why something failed is often there alone."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        given = {name: value for name, value in vars(record).items() if name not in RESERVED_ATTRS}
        return super().formatMessage(record) + "".join(f" {name}={value}" for name, value in given.items())

    def formatException(self, exc_info: _ExcInfo) -> str:
        return _format_exception(exc_info)


class _CarefulJsonFormatter(OrjsonFormatter):  # half the price of the standard library's JSON
    def formatException(self, ei: _ExcInfo) -> list[str]:  # type: ignore[override]
        return _format_exception(ei).splitlines()


def _json_formatter() -> logging.Formatter:
    return _CarefulJsonFormatter(
        "{asctime}{levelname}{name}{message}",
        style="{",
        rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
    )


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
