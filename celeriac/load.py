"""Puts load on a server, as `celeriac bench` does, and notes what each request met. No request is sent again."""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from contextlib import suppress
from datetime import datetime
from typing import Any, Protocol

import httpx

from celeriac.client import ApiError, AsyncClient, ClientError, JobSnapshot
from celeriac.client.errors import error_of
from celeriac.client.protocol import CONNECT_SECONDS, EventParser, http_options, unreachable, url_of_api
from celeriac.figures import Attempt, Tally

Request = Mapping[str, Any]  # `messages` or `prompt`, and sampling parameters

REFUSALS = (429, 503)
REFUSED_SECONDS = 1.0  # how long a place rests after a refusal that names no time, and after what failed
MAX_REST_SECONDS = 5.0
PATIENCE_SECONDS = 60.0  # for how long an accepted job is asked for again while the server refuses to tell of it
LEAST_REST_SECONDS = 0.1  # before it is asked for again, even if the server would have it at once
GOODBYE_SECONDS = 10.0  # for cancelling what still runs, after Ctrl-C

NO_LIMIT = httpx.Timeout(None, connect=CONNECT_SECONDS)  # an answer may take as long as it takes


class Target(Protocol):
    """One kind of server. `run` raises ClientError if the request is refused or fails, or the connection breaks."""

    async def run(self, request: Request, attempt: Attempt, on_note: Callable[[str], None]) -> None: ...

    async def cancel_open(self) -> None:
        """End what was left behind."""

    def goodbye(self) -> str:
        """What came of that."""

    async def close(self) -> None: ...


async def leave(target: Target) -> None:
    """End what runs there, as far as the server lets us in a few seconds."""
    with suppress(TimeoutError):
        async with asyncio.timeout(GOODBYE_SECONDS):
            await target.cancel_open()


class Stopwatch:
    def __init__(self) -> None:
        self._begun_at = time.perf_counter()

    def __call__(self) -> float:
        return time.perf_counter() - self._begun_at


class Celeriac:
    """Jobs, which are submitted and then followed, by their streams or by long polls."""

    def __init__(self, url: str, key: str | None, *, is_streaming: bool) -> None:
        self._client = AsyncClient(url, key, patience_seconds=0)
        self._is_streaming = is_streaming
        self._open: set[str] = set()
        self._submitting: set[asyncio.Task[JobSnapshot]] = set()
        self._num_cancelled = 0

    async def run(self, request: Request, attempt: Attempt, on_note: Callable[[str], None]) -> None:
        elapsed = Stopwatch()
        job = await self._submit(request)
        attempt.was_accepted = True
        try:
            raw = await self._end_of(job.id, attempt, elapsed, on_note)
        except ClientError:  # nobody follows the job any more, so it must not run beside the next one
            with suppress(ClientError):
                await self._cancel(job.id)
            raise
        attempt.took = elapsed()
        self._open.discard(job.id)
        _note_end(attempt, raw, is_streaming=self._is_streaming)

    async def cancel_open(self) -> None:
        if self._submitting:
            await asyncio.wait(self._submitting)
        self._num_cancelled = 0
        await asyncio.gather(*map(self._cancel_counted, list(self._open)), return_exceptions=True)

    def goodbye(self) -> str:
        num_left = self._num_cancelled + len(self._open) + len(self._submitting)
        return f"{self._num_cancelled} of {num_left} jobs were cancelled"

    async def close(self) -> None:
        await self._client.close()

    async def _submit(self, request: Request) -> JobSnapshot:
        """To its end even if this task is cancelled: a job whose id nobody has read could not be cancelled."""
        task = asyncio.create_task(self._client.submit(**request))
        self._submitting.add(task)
        task.add_done_callback(self._note_submitted)
        return await asyncio.shield(task)

    def _note_submitted(self, task: asyncio.Task[JobSnapshot]) -> None:
        self._submitting.discard(task)
        if not task.cancelled() and task.exception() is None:
            self._open.add(task.result().id)

    async def _cancel(self, job_id: str) -> None:
        await self._client.cancel(job_id)
        self._open.discard(job_id)

    async def _cancel_counted(self, job_id: str) -> None:
        await self._cancel(job_id)
        self._num_cancelled += 1

    async def _end_of(
        self, job_id: str, attempt: Attempt, elapsed: Stopwatch, on_note: Callable[[str], None]
    ) -> Mapping[str, Any]:
        """The job's last state. The job holds its place while the server refuses to tell of it, and is asked for again:
        nothing of it has been seen by then. Raises ClientError."""
        rested_seconds = 0.0
        while True:
            try:
                if self._is_streaming:
                    return await self._follow(job_id, attempt, elapsed, on_note)
                return (await self._client.wait(job_id)).raw
            except ApiError as exc:
                if exc.status_code not in REFUSALS or rested_seconds > PATIENCE_SECONDS:
                    raise
                seconds = max(_rest_after(exc), LEAST_REST_SECONDS)
                rested_seconds += seconds
                await asyncio.sleep(seconds)

    async def _follow(
        self, job_id: str, attempt: Attempt, elapsed: Stopwatch, on_note: Callable[[str], None]
    ) -> Mapping[str, Any]:
        async for event in self._client.stream(job_id):
            if event.name == "output.delta":
                attempt.pieces.append(elapsed())
            elif event.name == "job.queued" and event.data.get("waiting_for"):
                on_note(f"{job_id} waits for: {event.data['waiting_for']}")
            elif event.is_terminal:
                return event.data
        raise AssertionError("a stream ends with a terminal event")


class OpenAiServer:
    """`/v1/chat/completions` of any server that speaks OpenAI's protocol. It is sent no key but this one."""

    def __init__(self, url: str, key: str | None, *, is_streaming: bool) -> None:
        options = http_options(url_of_api(url).removesuffix("/v1"), key)
        if not key:
            options["headers"] = {}  # without the key of Celeriac's API
        self._is_streaming = is_streaming
        self._http = httpx.AsyncClient(**options)
        self._num_given_up = 0

    async def run(self, request: Request, attempt: Attempt, on_note: Callable[[str], None]) -> None:
        elapsed = Stopwatch()
        try:
            if self._is_streaming:
                usage = await self._stream(request, attempt, elapsed)
            else:
                response = await self._http.post("/v1/chat/completions", json=request, timeout=NO_LIMIT)
                if response.is_error:
                    raise error_of(response)
                usage = _object(response.json()).get("usage") or {}
        except asyncio.CancelledError:
            self._num_given_up += 1
            raise
        except (httpx.HTTPError, ValueError) as exc:  # ValueError: what it sends is no JSON
            raise unreachable(self._http.base_url, exc, was_there=False) from exc
        attempt.took = elapsed()
        attempt.first_token = attempt.pieces[0] if attempt.pieces else None
        attempt.outcome = "completed"
        attempt.prompt_tokens = usage.get("prompt_tokens", 0)
        attempt.completion_tokens = usage.get("completion_tokens", 0)

    async def cancel_open(self) -> None:
        pass  # a server ends what nobody listens to any more

    def goodbye(self) -> str:
        return f"{self._num_given_up} requests were given up"

    async def close(self) -> None:
        await self._http.aclose()

    async def _stream(self, request: Request, attempt: Attempt, elapsed: Stopwatch) -> Mapping[str, int]:
        body = {**request, "stream": True, "stream_options": {"include_usage": True}}
        usage: Mapping[str, int] = {}
        has_ended = False
        async with self._http.stream("POST", "/v1/chat/completions", json=body, timeout=NO_LIMIT) as response:
            if response.is_error:
                await response.aread()
                raise error_of(response)
            async for data in _data_of(response.aiter_lines()):
                if data.get("error"):
                    raise _error_in_stream(response.status_code, data["error"])
                usage = data.get("usage") or usage
                choice = (data.get("choices") or [{}])[0]
                has_ended = has_ended or choice.get("finish_reason") is not None
                delta = choice.get("delta") or {}
                if any(delta.get(name) for name in ("content", "reasoning_content", "reasoning", "tool_calls")):
                    attempt.pieces.append(elapsed())
        if not has_ended:
            raise ValueError("its stream ended before the answer did")
        return usage


async def _data_of(lines: AsyncIterator[str]) -> AsyncIterator[dict[str, Any]]:
    parser = EventParser()
    async for line in lines:
        if line.replace(" ", "") == "data:[DONE]":
            return
        if event := parser.feed(line):
            yield _object(event.data)


def _object(data: Any) -> dict[str, Any]:
    """Raises ValueError."""
    if not isinstance(data, dict):
        raise ValueError("its answer is no JSON object")
    return data


def _error_in_stream(status_code: int, error: Any) -> ApiError:
    """Some servers give a text, or no code."""
    told = error if isinstance(error, dict) else {"message": str(error)}
    return ApiError(status_code, {"error": told | {"code": told.get("code") or told.get("type") or "error"}})


def _rest_after(failure: ApiError) -> float:
    asked_for = failure.retry_after_seconds
    return min(REFUSED_SECONDS if asked_for is None else asked_for, MAX_REST_SECONDS)


def _note_end(attempt: Attempt, raw: Mapping[str, Any], *, is_streaming: bool) -> None:
    """From the job's last state. Without a stream, only the server knows when the first token came."""
    at = {name: datetime.fromisoformat(raw[f"{name}_at"]) for name in _TIMES if raw.get(f"{name}_at")}
    if "started" in at:
        attempt.queued = (at["started"] - at["created"]).total_seconds()
    if is_streaming:
        attempt.first_token = attempt.pieces[0] if attempt.pieces else None
    elif "first_token" in at:
        attempt.first_token = (at["first_token"] - at["created"]).total_seconds()
    usage = raw.get("usage") or {}
    attempt.outcome = raw["status"]
    attempt.code = (raw.get("error") or {}).get("code")
    attempt.is_cached = bool(raw.get("cached"))
    attempt.prompt_tokens = usage.get("prompt_tokens", 0)
    attempt.completion_tokens = usage.get("completion_tokens", 0)


_TIMES = ("created", "started", "first_token")


class LoadTest:
    """`concurrency` requests at any time, until `num_jobs` have been sent or `seconds` have passed."""

    def __init__(
        self,
        target: Target,
        requests: Iterator[Request],
        *,
        concurrency: int,
        num_jobs: int | None,
        seconds: float | None,
        on_change: Callable[["LoadTest"], None],
    ) -> None:
        self.attempts = Tally()  # of those that have ended
        self.num_open = 0
        self.was_interrupted = False
        self.elapsed = Stopwatch()
        self.seconds = 0.0  # until the last one ended, or Ctrl-C
        self._all_sent = asyncio.Event()
        self._target = target
        self._requests = requests
        self._concurrency = concurrency
        self._num_left = num_jobs
        self._seconds = seconds
        self._on_change = on_change

    @property
    def num_refused(self) -> int:
        return self.attempts.outcomes["refused"]

    async def run(self) -> None:
        """To its end, or until this task is cancelled, as by Ctrl-C: then what runs is cancelled, too."""
        self.elapsed = Stopwatch()
        places = [asyncio.create_task(self._fill_place()) for _ in range(self._concurrency)]
        try:
            await asyncio.gather(*places)
        except asyncio.CancelledError:
            self.was_interrupted = True
            self.seconds = self.elapsed()
        finally:
            for place in places:
                place.cancel()
            await asyncio.gather(*places, return_exceptions=True)
            await leave(self._target)

    async def _fill_place(self) -> None:
        while self._may_send():
            attempt = Attempt()
            rest_seconds = await self._noting(attempt, self._target.run(next(self._requests), attempt, _ignore))
            self.attempts.add(attempt)
            self.seconds = self.elapsed()
            self._on_change(self)
            await self._rest(rest_seconds)

    def _may_send(self) -> bool:
        if self._all_sent.is_set() or self._seconds_left() <= 0:
            return False
        if self._num_left is not None:
            self._num_left -= 1
            if not self._num_left:
                self._all_sent.set()
        return True

    def _seconds_left(self) -> float:
        return math.inf if self._seconds is None else self._seconds - self.elapsed()

    async def _rest(self, seconds: float) -> None:
        """No longer than there is something to send."""
        if not seconds:
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(min(seconds, self._seconds_left())):
                await self._all_sent.wait()

    async def _noting(self, attempt: Attempt, running: Coroutine[Any, Any, None]) -> float:
        """Returns for how many seconds to send nothing."""
        self.num_open += 1
        self._on_change(self)
        try:
            await running
        except ApiError as exc:
            is_refusal = exc.status_code in REFUSALS and not attempt.was_accepted
            attempt.outcome, attempt.code = "refused" if is_refusal else "failed", exc.code
            return _rest_after(exc)
        except ClientError:
            attempt.outcome, attempt.code = "broken", "connection"
            return REFUSED_SECONDS
        finally:
            self.num_open -= 1
        return 0.0


def _ignore(note: str) -> None:
    pass
