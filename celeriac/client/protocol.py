"""What both clients share, without I/O: requests, server-sent events, and when to try again."""

import json
import math
import os
import secrets
import ssl
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import httpx

from celeriac.client.answers import Unreadable, object_of
from celeriac.client.errors import NO_CONTENT, ApiError, ApiUnreachable, ClientError, UnexpectedAnswer
from celeriac.client.views import JobSnapshot, QueueUpdate, StreamEvent

CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 30.0
SILENCE_SECONDS = 45.0  # three of the API's heartbeats; a stream that is silent for longer is a dead connection
PATIENCE_SECONDS = 60.0  # how long to keep trying while the API does not answer, or is overloaded
POLL_SECONDS = 30  # of a long poll; proxies often cut longer ones
QUEUE_POLL_SECONDS = 1  # of a long poll that tells the place in the queue
BATCH_POLL_SECONDS = 1.0
RETRY_SECONDS = 0.5
NUM_PENDING_PER_PLACE = 4  # of a map: results that may be kept while an earlier one is still running

STREAM_TIMEOUT = httpx.Timeout(SILENCE_SECONDS, connect=CONNECT_SECONDS)

#: Named arguments of `submit` that belong to the job; all others are sampling parameters.
JOB_FIELDS = frozenset(
    {
        "celery",
        "chat_template_kwargs",
        "continue_final_message",
        "deadline",
        "dimensions",
        "inputs",
        "kind",
        "messages",
        "metadata",
        "model",
        "parallel_tool_calls",
        "priority",
        "prompt",
        "prompt_token_ids",
        "queries",
        "reasoning_effort",
        "result_ttl",
        "run_timeout",
        "start_timeout",
        "tools",
        "truncate_prompt_tokens",
        "use_cache",
        "webhook",
        "webhook_events",
    }
)

Prompt = str | Sequence[Mapping[str, Any]]
"""A text to continue, or the messages of a chat to answer."""


def job_fields(prompt: Prompt | None, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The body of `POST /v1/jobs`, without fields that are None."""
    given = {name: value for name, value in fields.items() if value is not None}
    body = {name: value for name, value in given.items() if name in JOB_FIELDS}
    params = {name: value for name, value in given.items() if name not in JOB_FIELDS}
    if prompt is not None:
        body["prompt" if isinstance(prompt, str) else "messages"] = prompt
    return body | {"params": params} if params else body


def new_idempotency_key() -> str:
    return secrets.token_hex(16)


def url_of_api(url: str | None) -> str:
    """Raises ClientError if no API is named: no port is guessed, since anything may listen there."""
    url = url or os.environ.get("CELERIAC_API_URL")
    if not url:
        raise ClientError("no API is named; pass its url, for instance http://127.0.0.1:8000, or set CELERIAC_API_URL")
    if not url.startswith(("http://", "https://")):  # it may hold a password, so it is not repeated
        raise ClientError("the URL of the API must begin with http:// or https://, as in http://127.0.0.1:8000")
    try:
        has_host = bool(httpx.URL(url).host)
    except httpx.InvalidURL:
        has_host = False
    if not has_host:
        raise ClientError(
            "the URL of the API names no host and port that there can be; write it as in http://127.0.0.1:8000"
        )
    return url.rstrip("/")


def segment(id_: str) -> str:
    """An id as a part of a path, whatever it contains. Raises ClientError if it is empty."""
    if not id_:
        raise ClientError("the id is empty; list the jobs for theirs")
    return quote(id_, safe="")


def http_options(url: str, key: str | None) -> dict[str, Any]:
    """Arguments of httpx's clients. Raises ClientError."""
    key = (key or os.environ.get("CELERIAC_API_KEY") or "").strip()
    if not (key.isascii() and key.isprintable()):  # httpx would repeat it in its error
        raise ClientError("the API key has characters that no key has; check --key, or CELERIAC_API_KEY")
    return {
        "base_url": url,
        "headers": {"authorization": f"Bearer {key}"} if key else {},
        "timeout": httpx.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS),
        # As many as the caller has streams and waits: beyond httpx's hundred, they would wait for one another.
        "limits": httpx.Limits(max_connections=None, max_keepalive_connections=100),
    }


def timeout_of_wait(seconds: float) -> httpx.Timeout:
    return httpx.Timeout(seconds + ANSWER_SECONDS, connect=CONNECT_SECONDS)


def unreachable(url: httpx.URL, cause: Exception, *, was_there: bool) -> ApiUnreachable:
    """`was_there`: whether this client has had an answer before."""
    name = str(url.copy_with(userinfo=b"")).rstrip("/")  # without credentials
    if isinstance(cause, Unreadable):
        reason = f"{name} {cause}; a proxy or another server answers there: check the URL"
        return UnexpectedAnswer(reason, was_there=was_there)
    return ApiUnreachable(
        f"no answer from the API at {name}: {_reason(cause)}; "
        "start it with `celeriac up` (everything) or `celeriac api`, or name another one with --url",
        was_there=was_there or not isinstance(cause, httpx.ConnectError | httpx.ConnectTimeout),
    )


def _reason(failure: Exception) -> str:
    """What the system said. asyncio has it only behind its own `All connection attempts failed`."""
    cause: BaseException | None = failure if isinstance(failure, httpx.ConnectError) else None
    while cause is not None:
        if isinstance(cause, BaseExceptionGroup):
            cause = cause.exceptions[0]
        if isinstance(cause, OSError) and not isinstance(cause, ssl.SSLError) and (cause.errno or 0) > 0:
            return os.strerror(cause.errno or 0)
        cause = cause.__cause__ or cause.__context__
    return str(failure).partition("] ")[2] or str(failure) or type(failure).__name__  # without "[Errno 111] "


@dataclass(slots=True)
class Patience:
    """When to try again after a failure, and when to give up. For one operation that may take many requests."""

    seconds: float  # since the last success
    _gives_up_at: float = field(init=False)

    def __post_init__(self) -> None:
        self.succeeded()

    def succeeded(self) -> None:
        self._gives_up_at = time.monotonic() + self.seconds

    def delay_after(self, failure: ClientError) -> float:
        """Seconds until the next try. Raises the failure if another try is no use, or the time is over."""
        if not failure.is_passing or time.monotonic() > self._gives_up_at:
            raise failure
        asked_for = failure.retry_after_seconds if isinstance(failure, ApiError) else None
        return RETRY_SECONDS if asked_for is None else asked_for


@dataclass(slots=True)
class Resumption:
    """Where a stream stands, so that each new connection continues after the last event that was seen."""

    job_id: str
    cursor: str | None
    patience: Patience
    has_ended: bool = False

    @property
    def path(self) -> str:
        return f"/v1/jobs/{segment(self.job_id)}/events"

    @property
    def params(self) -> dict[str, str]:
        return {"starting_after": self.cursor} if self.cursor else {"from": "start"}

    def connected(self, status_code: int) -> None:
        self.has_ended = status_code == NO_CONTENT  # the cursor is that of the last event

    def saw(self, event: StreamEvent) -> StreamEvent:
        self.cursor = event.id or self.cursor
        self.has_ended = event.is_terminal
        self.patience.succeeded()
        return event

    def delay_after(self, failure: ClientError | None) -> float:
        """After a connection that ended before the job did. Raises what cannot pass."""
        cut = ApiUnreachable(f"the stream of {self.job_id} ended before the job did", was_there=True)
        return self.patience.delay_after(failure or cut)


class WaitForEnd:
    """The state of a wait for a job's end by long polls."""

    def __init__(
        self,
        job_id: str,
        timeout: float | None,
        on_queue_update: Callable[[QueueUpdate], None] | None,
        patience: Patience,
    ) -> None:
        self.patience = patience
        self._job_id = job_id
        self._timeout = timeout
        self._ends_at = None if timeout is None else time.monotonic() + timeout
        self._on_queue_update = on_queue_update
        self._last_update: QueueUpdate | None = None

    @property
    def poll_seconds(self) -> int:
        most = POLL_SECONDS
        if self._on_queue_update is not None:
            most = QUEUE_POLL_SECONDS if self._last_update is not None else 0  # the first place is told at once
        return most if self._ends_at is None else max(0, min(most, math.ceil(self._ends_at - time.monotonic())))

    def saw(self, job: JobSnapshot) -> bool:
        """Whether the job has ended. Raises TimeoutError."""
        self.patience.succeeded()
        update = QueueUpdate.of(job)
        if self._on_queue_update is not None and update != self._last_update and not job.has_ended:
            self._on_queue_update(update)
        self._last_update = update
        if not job.has_ended and self._ends_at is not None and time.monotonic() >= self._ends_at:
            raise TimeoutError(f"{self._job_id} is {job.status} after {self._timeout:g} s; it goes on")
        return job.has_ended


class EventParser:
    """Server-sent events from lines, without comments (heartbeats) and empty events.

    https://html.spec.whatwg.org/multipage/server-sent-events.html
    """

    def __init__(self) -> None:
        self._name = "message"
        self._id: str | None = None
        self._data: list[str] = []

    def feed(self, line: str) -> StreamEvent | None:
        """The event that this line ends; None if it ends none. Raises Unreadable."""
        if not line:
            name, event_id, data = self._name, self._id, self._data
            self._name, self._id, self._data = "message", None, []
            return StreamEvent(name, _data_of(data), event_id) if data else None
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "event":
            self._name = value
        elif name == "id":
            self._id = value
        elif name == "data":
            self._data.append(value)
        return None


def _data_of(lines: Sequence[str]) -> dict[str, Any]:
    try:
        data = json.loads("\n".join(lines))
    except (ValueError, RecursionError) as exc:
        raise Unreadable("streams an event that is no JSON") from exc
    return dict(object_of(data, "an event"))


def parse_events(lines: Iterable[str]) -> Iterator[StreamEvent]:
    """The server-sent events in the lines of a response."""
    parser = EventParser()
    for line in lines:
        if event := parser.feed(line):
            yield event


def keys_of_a_run(run: str | None) -> Callable[[int], str]:
    """Idempotency keys for the prompts of a `map`. With a name for the run they are the same when it is repeated."""
    name = run or new_idempotency_key()
    return lambda index: f"{name}-{index}"


def upload(lines: Any, filename: str) -> dict[str, Any]:
    """Arguments of the POST to /v1/files."""
    return {"data": {"purpose": "batch"}, "files": {"file": (filename, lines, "application/jsonl")}}


def batch_body(
    file_id: str, endpoint: str, window: str, start_timeout: float | None, run_timeout: float | None
) -> dict[str, Any]:
    """The body of `POST /v1/batches`."""
    timeouts = {"start_timeout": start_timeout, "run_timeout": run_timeout}
    given = {name: seconds for name, seconds in timeouts.items() if seconds is not None}
    return {"input_file_id": file_id, "endpoint": endpoint, "completion_window": window} | given


def endpoint_of(first_line: bytes) -> str:
    """The route of a batch, from the first line of its file. Raises ClientError."""
    try:
        return str(json.loads(first_line.decode("utf-8-sig"))["url"])
    except (ValueError, KeyError, TypeError) as exc:
        raise ClientError(
            'the first line of the batch is not a request; lines look like {"custom_id": "1", "method": "POST", '
            '"url": "/v1/chat/completions", "body": {...}}'
        ) from exc


def with_bar(prompts: Iterable[Prompt]) -> Iterable[Prompt]:
    """The same prompts, with a progress bar on a terminal while they are taken."""
    from rich.progress import track  # slow to import, and not always needed

    return track(prompts, description="jobs")
