"""The HTTP client behind `celeriac submit`, `watch` and `jobs`. It resumes a stream whose connection drops.

with Client("http://127.0.0.1:8000") as client:
    job = client.submit({"model": "celeriac-mini", "prompt": "Once upon a time", "params": {"max_tokens": 50}})
    for event in client.events(job["id"]):
        print(event.data.get("text", ""), end="")
"""

import json
import secrets
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx

from domain.errors import ExpectedError

CONNECT_SECONDS = 5.0
SILENCE_SECONDS = 45.0  # three of the API's heartbeats; a stream that is silent for longer is a dead connection
PATIENCE_SECONDS = 60.0  # how long to keep trying to reconnect a dropped stream
NUM_SUBMIT_TRIES = 3

TERMINAL_EVENTS = frozenset({"job.completed", "job.failed", "job.cancelled", "job.expired"})


class ApiUnreachable(ExpectedError):
    """Nothing answers at the URL."""


class ApiError(ExpectedError):
    """The API answered with an error; the message is the API's own, with the field at fault and the code."""

    def __init__(self, status_code: int, body: Any) -> None:
        error = body.get("error") if isinstance(body, dict) else None
        error = error if isinstance(error, dict) else {}
        self.status_code = status_code
        self.code = str(error.get("code") or status_code)
        self.param = error.get("param")
        field = f" ({self.param})" if self.param else ""
        super().__init__(f"{error.get('message') or 'the API answered ' + str(status_code)}{field} [{self.code}]")

    @property
    def is_passing(self) -> bool:
        """Whether the same request may succeed in a moment."""
        return self.status_code in (429, 500, 502, 503)


@dataclass(frozen=True, slots=True)
class StreamEvent:
    """One server-sent event. `id` is the cursor for resuming after it."""

    name: str
    data: dict[str, Any]
    id: str | None

    @property
    def is_terminal(self) -> bool:
        return self.name in TERMINAL_EVENTS


class Client:
    """A connection to one API. Every method raises ApiUnreachable or ApiError."""

    def __init__(self, url: str, key: str | None = None) -> None:
        self.url = url.rstrip("/")
        self._has_answered = False
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(
            base_url=self.url, headers=headers, timeout=httpx.Timeout(30, connect=CONNECT_SECONDS)
        )
        self._name = str(self._http.base_url.copy_with(userinfo=b"")).rstrip("/")  # for messages: no credentials

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._http.close()

    def submit(self, body: dict[str, Any], idempotency_key: str | None = None) -> dict[str, Any]:
        """Submit a job and return it as accepted. If the connection drops, it is sent again; the idempotency key
        keeps it one job."""
        headers = {"idempotency-key": idempotency_key or secrets.token_hex(16)}
        for num_left in reversed(range(NUM_SUBMIT_TRIES)):
            try:
                return self._ask("POST", "/v1/jobs", json=body, headers=headers)
            except ApiUnreachable as exc:
                if num_left == 0 or isinstance(exc.__cause__, httpx.ConnectError):
                    raise
        raise AssertionError("the last try returns or raises")

    def job(self, job_id: str, *, wait_seconds: int = 0) -> dict[str, Any]:
        """The job as it is now, or as it ended if it ends within `wait_seconds` (at most 60)."""
        timeout = httpx.Timeout(wait_seconds + 30, connect=CONNECT_SECONDS)
        params = {"wait": wait_seconds} if wait_seconds else {}
        return self._ask("GET", f"/v1/jobs/{job_id}", params=params, timeout=timeout)

    def jobs(self, **filters: str | int | None) -> dict[str, Any]:
        """A page of jobs, newest first."""
        return self._ask(
            "GET", "/v1/jobs", params={name: value for name, value in filters.items() if value is not None}
        )

    def cancel(self, job_id: str) -> dict[str, Any]:
        return self._ask("POST", f"/v1/jobs/{job_id}/cancel")

    def health(self) -> dict[str, Any]:
        """The body of /health, whatever the status code."""
        try:
            return dict(self._http.get("/health", timeout=CONNECT_SECONDS).json())
        except (httpx.HTTPError, ValueError) as exc:
            raise self._unreachable(exc) from exc

    def events(self, job_id: str, *, starting_after: str | None = None) -> Iterator[StreamEvent]:
        """Every event of the job up to its terminal one. If the connection drops, continues after the last one."""
        cursor = starting_after
        gives_up_at = time.monotonic() + PATIENCE_SECONDS
        while True:
            failure: Exception = ApiUnreachable(f"the stream of {job_id} at {self._name} ended before the job did")
            try:
                for event in self._connect(job_id, cursor):
                    cursor = event.id or cursor
                    gives_up_at = time.monotonic() + PATIENCE_SECONDS
                    yield event
                    if event.is_terminal:
                        return
            except httpx.HTTPError as exc:
                failure = self._unreachable(exc)
                if not self._has_answered:  # most likely a wrong URL
                    raise failure from exc
            except ApiError as exc:
                if not exc.is_passing:
                    raise
                failure = exc
            if time.monotonic() > gives_up_at:
                raise failure
            time.sleep(0.5)

    def _connect(self, job_id: str, cursor: str | None) -> Iterator[StreamEvent]:
        params = {"starting_after": cursor} if cursor else {"from": "start"}
        timeout = httpx.Timeout(SILENCE_SECONDS, connect=CONNECT_SECONDS)
        with self._http.stream("GET", f"/v1/jobs/{job_id}/events", params=params, timeout=timeout) as response:
            self._has_answered = True
            if response.is_error:
                response.read()
                raise ApiError(response.status_code, _json(response))
            yield from parse_events(response.iter_lines())

    def _ask(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        try:
            response = self._http.request(method, path, **options)
        except httpx.HTTPError as exc:
            raise self._unreachable(exc) from exc
        self._has_answered = True
        body = _json(response)
        if response.is_error or not isinstance(body, dict):
            raise ApiError(response.status_code, body)
        return body

    def _unreachable(self, cause: Exception) -> ApiUnreachable:
        reason = str(cause).partition("] ")[2] or str(cause) or type(cause).__name__  # without "[Errno 111] "
        return ApiUnreachable(
            f"no answer from the API at {self._name}: {reason}; "
            "start it with `celeriac up` (everything) or `celeriac api`, or name another one with --url"
        )


def job_body(text: str, *, model: str, system: str | None, complete: bool, **params: Any) -> dict[str, Any]:
    """The request body for an answer to `text`, or for a continuation of it. Params that are not given are left out."""
    if not text.strip():
        raise ValueError("the prompt is empty; give some text, or - and some text on standard input")
    if complete and system:
        raise ValueError("--complete and --system cannot be combined; leave out one, or put both texts into the prompt")
    messages = [{"role": "system", "content": system}] if system else []
    request = {"prompt": text} if complete else {"messages": [*messages, {"role": "user", "content": text}]}
    given = {name: value for name, value in params.items() if value not in (None, ())}
    return {"model": model, **request, "params": given}


def parse_events(lines: Iterable[str]) -> Iterator[StreamEvent]:
    """The server-sent events in the lines of a response, without comments (heartbeats) and empty events."""
    name, event_id, data = "message", None, list[str]()
    for line in lines:
        if not line:
            if data:
                yield StreamEvent(name, json.loads("\n".join(data)), event_id)
            name, event_id, data = "message", None, []
            continue
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "event":
            name = value
        elif field == "id":
            event_id = value
        elif field == "data":
            data.append(value)


def _json(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError:
        return None
