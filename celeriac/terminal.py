"""What the commands print: progress, a job's text as it arrives, URLs, and errors in one line."""

import shutil
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from celeriac.client import ApiError, BatchSnapshot, Client, ClientError, StreamEvent
from celeriac.consoles import VISIBLE, VisibleConsole
from celeriac.options import print_json
from celeriac.tables import with_percent

if TYPE_CHECKING:
    from celeriac.load import LoadTest

UNAUTHORIZED = 401
REPORT_SECONDS = 0.5  # between two reports on one step of a pull


class _Shown:
    """Its progress is on the screen while it is entered."""

    _progress: Progress

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()


class Board(_Shown):
    """What is starting and how long it takes: live rows on a terminal, otherwise a line for each part when ready."""

    def __init__(self, console: Console) -> None:
        self._console = console
        columns = (
            SpinnerColumn(finished_text="[green]✓[/]"),
            TextColumn("{task.description:<12}"),
            TextColumn("[dim]{task.elapsed:5.1f} s[/]"),
        )
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self._rows: dict[str, tuple[TaskID, float]] = {}

    def begin(self, title: str) -> None:
        self._rows[title] = (self._progress.add_task(title, total=1), time.monotonic())

    def done(self, title: str) -> None:
        task_id, begun_at = self._rows[title]
        self._progress.update(task_id, completed=1)
        self._progress.stop_task(task_id)  # stops its clock, too
        if not self._console.is_terminal:
            self._console.print(f"{title} is ready after {time.monotonic() - begun_at:.1f} s")


class PullReporter:
    """The progress of a pull for programs: a line of JSON at each step, and at most every half second within one."""

    def __init__(self) -> None:
        self._said: dict[str, Any] = {}
        self._said_at = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass

    def begin(self, what: str, num_bytes: int | None) -> None:
        self._said = {"step": what, "bytes": 0, "total_bytes": num_bytes}
        self._say()

    def advance(self, num_bytes: int) -> None:
        self._said["bytes"] = self._said.get("bytes", 0) + num_bytes
        if time.monotonic() - self._said_at >= REPORT_SECONDS:
            self._say()

    def wait(self, why: str) -> None:
        self.begin(why, None)

    def _say(self) -> None:
        self._said_at = time.monotonic()
        print_json(self._said)


class PullPrinter:
    """The progress of a pull, with bytes and rate: a bar on a terminal, otherwise a line after each step."""

    def __init__(self, console: Console) -> None:
        self._console = console
        columns = (
            SpinnerColumn(finished_text="[green]✓[/]"),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task_id: TaskID | None = None
        self._what = ""
        self._num_bytes = 0
        self._begun_at = 0.0

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if exc is None:
            self._end_step()
        self._progress.stop()

    def begin(self, what: str, num_bytes: int | None) -> None:
        self._end_step()
        self._what, self._num_bytes, self._begun_at = what, 0, time.monotonic()
        self._task_id = self._progress.add_task(what, total=num_bytes)

    def advance(self, num_bytes: int) -> None:
        self._num_bytes += num_bytes
        if self._task_id is not None:
            self._progress.update(self._task_id, advance=num_bytes)

    def wait(self, why: str) -> None:
        self._console.print(why, markup=False)

    def _end_step(self) -> None:
        if self._task_id is None:
            return
        self._progress.update(self._task_id, total=self._num_bytes or 1, completed=self._num_bytes or 1)
        self._progress.stop_task(self._task_id)
        if not self._console.is_terminal:
            seconds = max(time.monotonic() - self._begun_at, 1e-3)
            rate = f", {self._num_bytes / 1e6:,.1f} MB, {self._num_bytes / 1e6 / seconds:,.1f} MB/s"
            self._console.print(f"{self._what}: {seconds:.1f} s{rate if self._num_bytes else ''}", markup=False)
        self._task_id = None


class JobPrinter:
    """Prints a job's stream: its text to `out`, as it arrives or at the end, and other events to `notes`.

    If the job has several choices, the first one is printed live and the others at the end, with their numbers.
    """

    def __init__(self, out: Console, notes: Console, *, is_live: bool = True) -> None:
        self._out = out
        self._notes = notes
        self._is_live = is_live
        self._begun_at = time.monotonic()
        self._first_text_at: float | None = None
        self._texts: dict[int, str] = {0: ""}

    def print_all(self, events: Iterable[StreamEvent]) -> StreamEvent:
        """Print events up to and including the terminal one, and return that."""
        for event in events:
            if event.name == "output.delta":
                self._add(event.data.get("index", 0), event.data.get("text", ""))
            elif event.is_terminal:
                self._finish(event)
                return event
            elif event.name == "job.reset":
                self._begin_anew()
            elif note := _describe(event):
                self._notes.print(note, style="dim", markup=False)
        raise AssertionError("a stream ends with a terminal event")

    def _add(self, index: int, text: str) -> None:
        self._first_text_at = self._first_text_at or time.monotonic()
        self._texts[index] = self._texts.get(index, "") + text
        if self._is_live and index == 0:
            self._write(text)

    def _write(self, text: str) -> None:
        """Into a pipe as the model wrote it."""
        self._out.file.write(text.translate(VISIBLE) if self._out.is_terminal else text)
        self._out.file.flush()

    def _begin_anew(self) -> None:
        has_text = any(self._texts.values())
        self._texts = {0: ""}
        if has_text:
            note = "\n(the model was replaced: the answer starts again, and the text above is void)"
            self._notes.print(note, style="dim", markup=False)

    def _finish(self, event: StreamEvent) -> None:
        first, *others = (text for _, text in sorted(self._texts.items()))
        if first or event.name == "job.completed":  # of a job that never began there is nothing to print
            self._write("\n" if self._is_live else f"{first}\n")
        for index, text in enumerate(others, start=1):
            self._write(f"\n[{index}] {text}\n")
        parts = [f"{event.data.get('id')}: {event.name.removeprefix('job.')}"]
        usage, error = event.data.get("usage") or {}, event.data.get("error")
        if usage:
            parts.append(f"{usage.get('completion_tokens')} tokens")
        if event.data.get("finish_reason"):
            parts.append(event.data["finish_reason"])
        if error:
            parts.append(f"{error.get('message')} [{error.get('code')}]")
        parts.append(f"{time.monotonic() - self._begun_at:.2f} s")
        if self._first_text_at is not None:
            parts.append(f"first text after {(self._first_text_at - self._begun_at) * 1000:.0f} ms")
        self._notes.print(", ".join(parts), style="dim", markup=False)


class BatchPrinter(_Shown):
    """The progress of a batch: a bar on a terminal, otherwise its id at the start and its counts at the end."""

    def __init__(self) -> None:
        self._notes = plain_console(stderr=True)
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
        self._progress = Progress(
            *columns, TimeElapsedColumn(), console=self._notes, disable=not self._notes.is_terminal
        )
        self._task_id = self._progress.add_task("", total=None)
        self._batch_id: str | None = None

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        super().__exit__(exc_type, exc, traceback)
        if isinstance(exc, KeyboardInterrupt) and self._batch_id is not None:
            self._notes.print(f"\n{self._batch_id} goes on; fetch it: celeriac batch get {self._batch_id} -o FILE")

    def show(self, batch: BatchSnapshot) -> None:
        if self._batch_id is None:
            self._batch_id = batch.id
            self._notes.print(f"{batch.id} is accepted", markup=False)
        num_done = batch.num_completed + batch.num_failed
        self._progress.update(
            self._task_id, description=batch.status, total=batch.num_lines or None, completed=num_done
        )

    def finish(self, batch: BatchSnapshot) -> None:
        """Print the counts; exit with 1 unless every line was completed."""
        self._progress.stop()
        counts = f"{batch.num_completed} of {batch.num_lines} lines completed, {batch.num_failed} failed"
        self._notes.print(f"{batch.id} is {batch.status}: {counts}", markup=False)
        if batch.num_completed < batch.num_lines:
            sys.exit(1)


class LoadPrinter(_Shown):
    """The progress of a load test: a bar on a terminal, otherwise nothing."""

    def __init__(self, notes: Console, *, num_jobs: int | None, seconds: float | None) -> None:
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn())
        self._progress = Progress(*columns, TimeElapsedColumn(), console=notes, disable=not notes.is_terminal)
        self._task_id = self._progress.add_task("", total=num_jobs or seconds)
        self._seconds = seconds

    def show(self, load: "LoadTest") -> None:
        num_ended = len(load.attempts)
        refused = f", {load.num_refused} refused" if load.num_refused else ""
        completed = num_ended if self._seconds is None else min(load.elapsed(), self._seconds)
        description = f"{num_ended} ended{refused}, {load.num_open} under way"
        self._progress.update(self._task_id, description=description, completed=completed)


def follow(client: Client, job_id: str, *, is_live: bool, starting_after: str | None = None) -> int:
    """Print a job's text, live or at its end. Returns the exit code: 0 only for a completed job."""
    notes = plain_console(stderr=True)
    printer = JobPrinter(plain_console(), notes, is_live=is_live)
    try:
        end = printer.print_all(client.stream(job_id, starting_after=starting_after))
    except KeyboardInterrupt:
        notes.print(f"\n{job_id} is still running; see it: celeriac watch {job_id}; end it: celeriac cancel {job_id}")
        return 130
    return 0 if end.name == "job.completed" else 1


def plain_console(*, stderr: bool = False) -> Console:
    """A console that prints text as it is, without wrapping, highlighting or emoji codes."""
    return VisibleConsole(stderr=stderr, highlight=False, soft_wrap=True, emoji=False)


def own_command() -> str:
    """How to type this command: by its path, unless a shell finds it by its name."""
    from local.processes import short_path  # raises ModuleNotFoundError where only the client is installed

    path = Path(sys.executable).parent / "celeriac"
    return "celeriac" if shutil.which("celeriac") == str(path) else short_path(path)


def where_everything_is(*, api_url: str, maintenance_url: str, worker_url: str, flower_url: str, logs: str) -> str:
    return f"""
  Dashboard  {api_url}
  API        {api_url}/docs
  Health     {api_url}/health
             {maintenance_url}/health (maintenance)
  Metrics    {api_url}/metrics
             {worker_url}/metrics (worker)
             {maintenance_url}/metrics (maintenance)
  Flower     {flower_url}
  Logs       {logs}
"""


def first_steps(api_url: str, model: str, job_id: str, celeriac: str, *, needs_key: bool) -> str:
    """Commands to paste, with the real port and a job that exists."""
    key = f"  export CELERIAC_API_KEY=$({celeriac} keys create)\n" if needs_key else ""
    header = ' -H "authorization: Bearer $CELERIAC_API_KEY"' if needs_key else ""
    return f"""Try it from another terminal:

{key}  {celeriac} submit "What is 17 + 25?"
  {celeriac} jobs
  curl -s {api_url}/v1/jobs{header} -H 'content-type: application/json' \\
       -d '{{"model": "{model}", "messages": [{{"role": "user", "content": "What is 17 + 25?"}}]}}'
  curl -s {api_url}/v1/jobs/{job_id}{header}
  curl -N '{api_url}/v1/jobs/{job_id}/events?from=start'{header}
"""


def _describe(event: StreamEvent) -> str | None:
    """A line for an event that is not text; None if it need not be shown."""
    data = event.data
    if event.name == "job.queued" and data.get("waiting_for") == "model_load":
        is_loading = data.get("load_percent") is not None
        return with_percent("queued, its model is loading" if is_loading else "queued, its model is not loaded", data)
    if event.name == "job.queued" and data.get("position"):
        return f"queued, position {data['position']}"
    if event.name == "job.paused":
        return "\n(paused, since it is another tenant's turn; the text will go on)"
    if event.name == "job.retrying":
        return f"\n(continuing with attempt {data.get('attempt', '?')}; the text above remains valid)"
    return None


def _where_keys_come_from() -> str:
    with suppress(ModuleNotFoundError):  # where only the client is installed, no keys are made
        return f"$({own_command()} keys create), or the key that you were given"
    return "the key that you were given"


def explain(exc: Exception) -> str | None:
    """The message of an expected error in one line; None if the error is a bug."""
    if isinstance(exc, ApiError) and exc.status_code == UNAUTHORIZED:
        return f"{exc}: export CELERIAC_API_KEY={_where_keys_come_from()}"
    if isinstance(exc, ClientError):
        return str(exc)
    if isinstance(exc, UnicodeEncodeError) and exc.reason == "surrogates not allowed":
        return "an argument is not UTF-8; convert it, or use a UTF-8 locale such as LC_ALL=C.UTF-8"
    if isinstance(exc, OSError) and exc.filename is not None and exc.strerror:
        return f"{exc.filename}: {exc.strerror}"
    with suppress(ModuleNotFoundError):  # where only the client is installed, there are no others
        return _explain_server_error(exc)
    return None


def _explain_server_error(exc: Exception) -> str | None:
    # Imported here, since only failed commands need them.
    from pydantic import ValidationError
    from sqlalchemy.exc import OperationalError

    from domain.errors import ExpectedError

    if isinstance(exc, ExpectedError):
        return str(exc)
    if isinstance(exc, OperationalError):
        return (
            f"the database does not answer: {str(exc).strip().splitlines()[0]}; "
            "start everything with `celeriac up`, or name a server in CELERIAC_DATABASE_URL"
        )
    if isinstance(exc, ValidationError) and exc.title == "Settings":
        return "; ".join(explain_setting(error) for error in exc.errors(include_url=False))
    return None


def explain_setting(error: Mapping[str, Any]) -> str:
    """The message of one of Pydantic's errors. URLs and keys hold secrets, so their values are not shown."""
    name = "_".join(map(str, error["loc"]))
    is_secret = name.endswith(("_url", "_key"))
    value, reason = "wrong" if is_secret else repr(error["input"]), error["msg"].removeprefix("Value error, ")
    return f"CELERIAC_{name.upper()} is {value}: {reason}"
