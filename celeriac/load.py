"""Puts load on a server, as `celeriac bench` does, and notes what each request met. Nothing here is tried again."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol

import httpx

from celeriac.client import ApiError, AsyncClient, ClientError, JobSnapshot
from celeriac.client.errors import error_of
from celeriac.client.protocol import EventParser, http_options, unreachable, url_of_api

Request = Mapping[str, Any]  # `messages` or `prompt`, and sampling parameters

REFUSED_SECONDS = 1.0  # how long a place rests after a refusal that names no time
MAX_REST_SECONDS = 5.0
GOODBYE_SECONDS = 10.0  # for cancelling what still runs, after Ctrl-C


@dataclass(slots=True)
class Attempt:
    """One request and what came of it. Times are seconds since it was sent."""

    outcome: str = "open"  # then completed, failed, cancelled, expired, refused, broken
    code: str | None = None  # of a refusal, or of the job's error
    pieces: list[float] = field(default_factory=list)  # when each piece of text came
    first_token: float | None = None
    queued: float | None = None  # as the server tells it
    took: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    is_cached: bool = False

    @property
    def time_per_token(self) -> float | None:
        """Between the first and the last piece of text, for each token after the first."""
        if len(self.pieces) < 2 or self.completion_tokens < 2:
            return None
        return (self.pieces[-1] - self.pieces[0]) / (self.completion_tokens - 1)


class Target(Protocol):
    """One kind of server. `run` raises ClientError if the request is refused, or the connection breaks."""

    async def run(self, request: Request, attempt: Attempt, on_note: Callable[[str], None]) -> None: ...

    async def cancel_open(self) -> int:
        """End what was left behind; returns how many there were."""

    async def close(self) -> None: ...


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

    async def run(self, request: Request, attempt: Attempt, on_note: Callable[[str], None]) -> None:
        elapsed = Stopwatch()
        job = await self._submit(request)
        if self._is_streaming:
            raw = await self._follow(job.id, attempt, elapsed, on_note)
        else:
            raw = (await self._client.wait(job.id)).raw
        attempt.took = elapsed()
        self._open.discard(job.id)
        _note_end(attempt, raw, is_streaming=self._is_streaming)

    async def cancel_open(self) -> int:
        if self._submitting:
            await asyncio.wait(self._submitting)
        left = list(self._open)
        await asyncio.gather(*map(self._client.cancel, left), return_exceptions=True)
        return len(left)

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
    """`/v1/chat/completions` of any server that speaks OpenAI's protocol."""

    def __init__(self, url: str, key: str | None, *, is_streaming: bool) -> None:
        self._is_streaming = is_streaming
        self._http = httpx.AsyncClient(**http_options(url_of_api(url).removesuffix("/v1"), key))

    async def run(self, request: Request, attempt: Attempt, on_note: Callable[[str], None]) -> None:
        elapsed = Stopwatch()
        try:
            if self._is_streaming:
                usage = await self._stream(request, attempt, elapsed)
            else:
                response = await self._http.post("/v1/chat/completions", json=request, timeout=None)
                if response.is_error:
                    raise error_of(response)
                usage = response.json().get("usage") or {}
        except (httpx.HTTPError, ValueError) as exc:  # ValueError: what it sends is no JSON
            raise unreachable(self._http.base_url, exc, was_there=False) from exc
        attempt.took = elapsed()
        attempt.first_token = attempt.pieces[0] if attempt.pieces else None
        attempt.outcome = "completed"
        attempt.prompt_tokens = usage.get("prompt_tokens", 0)
        attempt.completion_tokens = usage.get("completion_tokens", 0)

    async def cancel_open(self) -> int:
        return 0  # a server ends what nobody listens to any more

    async def close(self) -> None:
        await self._http.aclose()

    async def _stream(self, request: Request, attempt: Attempt, elapsed: Stopwatch) -> Mapping[str, int]:
        body = {**request, "stream": True, "stream_options": {"include_usage": True}}
        usage: Mapping[str, int] = {}
        async with self._http.stream("POST", "/v1/chat/completions", json=body, timeout=None) as response:
            if response.is_error:
                await response.aread()
                raise error_of(response)
            async for data in _data_of(response.aiter_lines()):
                if data.get("error"):
                    raise ApiError(response.status_code, data)
                usage = data.get("usage") or usage
                delta = (data.get("choices") or [{}])[0].get("delta") or {}
                if any(delta.get(name) for name in ("content", "reasoning_content", "reasoning", "tool_calls")):
                    attempt.pieces.append(elapsed())
        return usage


async def _data_of(lines: AsyncIterator[str]) -> AsyncIterator[dict[str, Any]]:
    parser = EventParser()
    async for line in lines:
        if line.replace(" ", "") == "data:[DONE]":
            return
        if event := parser.feed(line):
            yield event.data


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
        self.attempts: list[Attempt] = []
        self.num_open = 0
        self.num_refused = 0
        self.num_cancelled = 0  # after Ctrl-C
        self.was_interrupted = False
        self.elapsed = Stopwatch()
        self._target = target
        self._requests = requests
        self._concurrency = concurrency
        self._num_left = num_jobs
        self._seconds = seconds
        self._on_change = on_change

    async def run(self) -> None:
        """To its end, or until this task is cancelled, as by Ctrl-C: then what runs is cancelled, too."""
        self.elapsed = Stopwatch()
        places = [asyncio.create_task(self._fill_place()) for _ in range(self._concurrency)]
        try:
            await asyncio.gather(*places)
        except asyncio.CancelledError:
            self.was_interrupted = True
        finally:
            for place in places:
                place.cancel()
            await asyncio.gather(*places, return_exceptions=True)
            with suppress(TimeoutError):
                async with asyncio.timeout(GOODBYE_SECONDS):
                    self.num_cancelled = await self._target.cancel_open()

    async def _fill_place(self) -> None:
        while self._may_send():
            attempt = Attempt()
            rest_seconds = await self._noting(attempt, self._target.run(next(self._requests), attempt, _ignore))
            self.attempts.append(attempt)
            self._on_change(self)
            await asyncio.sleep(rest_seconds)

    def _may_send(self) -> bool:
        if self._seconds is not None and self.elapsed() >= self._seconds:
            return False
        if self._num_left is None:
            return True
        self._num_left -= 1
        return self._num_left >= 0

    async def _noting(self, attempt: Attempt, running: Coroutine[Any, Any, None]) -> float:
        """Returns for how many seconds to send nothing."""
        self.num_open += 1
        self._on_change(self)
        try:
            await running
        except ApiError as exc:
            attempt.outcome, attempt.code = "refused", exc.code
            self.num_refused += 1
            asked_for = exc.retry_after_seconds
            return min(REFUSED_SECONDS if asked_for is None else asked_for, MAX_REST_SECONDS)
        except ClientError:
            attempt.outcome, attempt.code = "broken", "connection"
            return REFUSED_SECONDS
        finally:
            self.num_open -= 1
        return 0.0


def _ignore(note: str) -> None:
    pass
