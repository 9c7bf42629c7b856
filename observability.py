"""Structured logging with job and request ids, and detection of blocked event loops.

Prompts, outputs and keys are never logged; ids, lengths, counts and codes are. Of an exception only the first line is
logged, because database and validation errors repeat values in the lines after it.

EventLoopMonitor is for every process that runs asyncio: it measures the lag of the event loop as a metric, and logs the
stack when the loop is blocked.
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
from time import localtime, monotonic, strftime
from types import FrameType, TracebackType
from typing import Any, Literal, Self, TextIO

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.orjson import OrjsonFormatter

from metrics import event_loop_lag_seconds

log = logging.getLogger(__name__)

job_id_context: ContextVar[str | None] = ContextVar("job_id", default=None)

request_id_context: ContextVar[str | None] = ContextVar("request_id", default=None)

#: The id of the API key of a request or of a batch's; never logged.
key_id_context: ContextVar[str | None] = ContextVar("key_id", default=None)

#: The place of the request in a trace, as its `traceparent` or our own span says (W3C Trace Context).
traceparent_context: ContextVar[str | None] = ContextVar("traceparent", default=None)

#: The ids of the jobs that a request has submitted, newest last, for an error response if the request fails later.
submitted_job_ids: ContextVar[list[str] | None] = ContextVar("submitted_job_ids", default=None)

_MAX_EXCEPTION_CHARS = 300

_ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]


def note_submitted(job_id: str) -> None:
    if (job_ids := submitted_job_ids.get()) is not None:
        job_ids.append(job_id)


@contextlib.contextmanager
def job_context(job_id: str) -> Iterator[None]:
    """Every log line within this context has the job's id. `job_id` is the external one."""
    token = job_id_context.set(job_id)
    try:
        yield
    finally:
        job_id_context.reset(token)


def configure_logging(level: str, log_format: Literal["json", "text"]) -> None:
    """Send all logging of this process to stderr in one format. May be called again: the last call wins."""
    handler = _TellingHandler(sys.stderr)
    handler.addFilter(_add_context)
    handler.addFilter(_shorten)
    handler.setFormatter(_CarefulJsonFormatter() if log_format == "json" else _TextFormatter(_TEXT_FORMAT))
    root = logging.getLogger()
    root.handlers = [handler]
    logging.captureWarnings(True)
    root.setLevel(level)
    # Their INFO lines repeat ours, or there is one per request.
    for name in ("uvicorn.access", "httpx", "httpcore", "sqlalchemy.engine"):
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
    _collect_only_what_is_shown()


LOST_SECONDS = 60.0  # for which it is told that lines were lost

_lost: tuple[float, str] | None = None  # when a line was last lost, monotonic, and why


class _TellingHandler(logging.StreamHandler[TextIO]):
    """A line that cannot be written, such as to a full disk, is lost, and nowhere else is a place to say so."""

    def handleError(self, record: logging.LogRecord) -> None:
        global _lost
        exc = sys.exc_info()[1]
        if isinstance(exc, OSError):
            _lost = monotonic(), exc.strerror or type(exc).__name__
        else:
            super().handleError(record)


def lost_lines() -> str | None:
    """Why this process has lost lines of its log within the last minute; None if it has not."""
    return _lost[1] if _lost is not None and monotonic() - _lost[0] < LOST_SECONDS else None


def _collect_only_what_is_shown() -> None:
    """Our formats show neither the place in the code that logged a line nor its thread, process or task, which take
    longer to find than the rest of the line (docs.python.org/3/howto/logging.html#optimization)."""
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    if sys.version_info >= (3, 12):
        logging.logAsyncioTasks = False


def describe_exception(exc: BaseException) -> str:
    """`Type: first line`, shortened. The other lines are left out, as database errors quote values there."""
    first_line = str(exc).partition("\n")[0][:_MAX_EXCEPTION_CHARS]
    return f"{type(exc).__name__}: {first_line}" if first_line else type(exc).__name__


def _shorten(record: logging.LogRecord) -> bool:
    """Make each record one line: Celery and others log messages with line breaks."""
    message = record.getMessage()
    if "\n" in message:
        record.msg, record.args = " ".join(message.split()), ()
    return True


_OWN_ATTRIBUTES = frozenset(RESERVED_ATTRS)  # of every record; the others are `extra`

_TEXT_FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"


def _add_context(record: logging.LogRecord) -> bool:
    trace, known = traceparent_context.get(), vars(record)
    ids = {
        "job_id": job_id_context.get(),
        "request_id": request_id_context.get(),
        "trace_id": trace_id_of(trace) if trace else None,
    }
    for name, value in ids.items():
        if value is not None:
            known.setdefault(name, value)
    return True


def trace_id_of(traceparent: str) -> str:
    return traceparent.split("-")[1]


def _format_exception(exc_info: _ExcInfo) -> str:
    exc = exc_info[1]
    if exc is None:
        return ""
    frames = "".join(traceback.format_tb(exc.__traceback__))
    cause = exc.__cause__
    because = f"\ncaused by {describe_exception(cause)}" if cause is not None else ""
    return f"{frames}{describe_exception(exc)}{because}"


class _TextFormatter(logging.Formatter):
    """Appends the `extra` fields, as the JSON format does: they often have the reason of a failure."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        given = {name: value for name, value in vars(record).items() if name not in _OWN_ATTRIBUTES}
        return super().formatMessage(record) + "".join(f" {name}={value}" for name, value in given.items())

    def formatException(self, exc_info: _ExcInfo) -> str:
        return _format_exception(exc_info)


class _CarefulJsonFormatter(OrjsonFormatter):  # half the price of the standard library's JSON
    _second: tuple[int, str] = (0, "")  # the newest, and how it is written

    def format(self, record: logging.LogRecord) -> str:
        """As the parent does, which looks at each attribute of the record several times."""
        line: dict[str, Any] = {
            "time": self.formatTime(record),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: value for name, value in vars(record).items() if name not in _OWN_ATTRIBUTES}
        if record.exc_info:
            line["exc_info"] = self.formatException(record.exc_info)
        return self.jsonify_log_record(line)

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        second, written = self._second
        if second != int(record.created):
            second = int(record.created)
            written = strftime("%Y-%m-%d %H:%M:%S", localtime(second))
            self._second = second, written  # at once, as other threads log, too
        return f"{written},{int(record.msecs):03}"

    def formatException(self, ei: _ExcInfo) -> list[str]:  # type: ignore[override]
        return _format_exception(ei).splitlines()


BEAT_SECONDS = 0.1  # between two measurements

STALL_SECONDS = 0.25  # a loop that is this late counts as blocked

MAX_FRAMES = 25  # of a logged stack


class EventLoopMonitor:
    """Monitors the event loop on which it is entered. Use as an async context manager.

    A timer on the loop measures how late it fires; a thread checks the timer and takes the stack while the loop is
    blocked."""

    def __init__(self, *, stall_seconds: float = STALL_SECONDS) -> None:
        self._stall_seconds = stall_seconds
        self._due_at = 0.0  # when the timer should fire next; monotonic
        self._logged_at = 0.0  # the due time of the timer whose delay was logged
        self._is_over = threading.Event()
        self._timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._thread_id = threading.get_ident()
        self._plan_beat()
        self._thread = threading.Thread(target=self._check, name="event-loop-monitor", daemon=True)
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
        if late_seconds > self._stall_seconds and self._logged_at != self._due_at:
            # Code that held the interpreter's lock blocked the thread, too.
            self._log(late_seconds, "not known: the thread that takes it was blocked, too")
        self._plan_beat()

    def _check(self) -> None:
        while not self._is_over.wait(BEAT_SECONDS):
            due_at = self._due_at
            late_seconds = monotonic() - due_at
            frame = sys._current_frames().get(self._thread_id)
            if late_seconds > self._stall_seconds and self._logged_at != due_at and frame is not None:
                self._logged_at = due_at
                self._log(late_seconds, describe_stack(frame))

    def _log(self, late_seconds: float, stack: str) -> None:
        log.warning("the event loop is blocked", extra={"seconds_so_far": round(late_seconds, 3), "stack": stack})


def describe_stack(frame: FrameType) -> str:
    """Files, lines and functions, innermost first, without any values."""
    summary = traceback.StackSummary.extract(traceback.walk_stack(frame), limit=MAX_FRAMES, lookup_lines=False)
    return " < ".join(f"{'/'.join(PurePath(one.filename).parts[-2:])}:{one.lineno} {one.name}" for one in summary)
