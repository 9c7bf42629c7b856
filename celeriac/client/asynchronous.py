"""The client for asyncio: the methods of `Client`, awaited; celeriac/client/sync.py explains each."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self, TypeVar

import httpx

from celeriac.client.answers import Unreadable, id_of, rows_of
from celeriac.client.errors import (
    ApiError,
    ApiUnreachable,
    ClientError,
    answer_of,
    body_of,
    completed,
    error_of,
    not_refused,
    refuse_other_than_events,
    refuse_redirect,
)
from celeriac.client.protocol import (
    BATCH_POLL_SECONDS,
    CONNECT_SECONDS,
    NUM_PENDING_PER_PLACE,
    PATIENCE_SECONDS,
    STREAM_TIMEOUT,
    EventParser,
    Patience,
    Prompt,
    Resumption,
    WaitForEnd,
    batch_body,
    endpoint_of,
    http_options,
    job_fields,
    keys_of_a_run,
    new_idempotency_key,
    segment,
    timeout_of_wait,
    unreachable,
    upload,
    url_of_api,
    with_bar,
)
from celeriac.client.views import BatchSnapshot, JobPage, JobSnapshot, QueueUpdate, StreamEvent

T = TypeVar("T")


class AsyncClient:
    """Like `Client`, for asyncio.

    ```python
    async with AsyncClient("http://127.0.0.1:8000") as client:
        job = await client.submit("Once upon a time", max_tokens=50)
        async for event in client.stream(job.id):
            print(event.text, end="", flush=True)
    ```
    """

    def __init__(
        self, url: str | None = None, key: str | None = None, *, patience_seconds: float = PATIENCE_SECONDS
    ) -> None:
        """By default CELERIAC_API_URL and CELERIAC_API_KEY. Raises ClientError if no URL is named.

        For `patience_seconds`, what fails because the API is away or overloaded is tried again.
        """
        self.url = url_of_api(url)
        self._http = httpx.AsyncClient(**http_options(self.url, key))
        self._patience_seconds = patience_seconds
        self._has_answered = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    # One job

    async def submit(
        self, prompt: Prompt | None = None, *, idempotency_key: str | None = None, **fields: Any
    ) -> JobSnapshot:
        """Submit a job and return it as accepted."""
        body = job_fields(prompt, fields)
        headers = {"idempotency-key": idempotency_key or new_idempotency_key()}
        patience = Patience(self._patience_seconds)
        while True:
            try:
                return await self._ask("POST", "/v1/jobs", JobSnapshot.of, json=body, headers=headers)
            except ClientError as exc:
                if not exc.is_unreached:
                    raise
                await asyncio.sleep(patience.delay_after(exc))

    async def get(self, job_id: str, *, wait_seconds: int = 0, include: Sequence[str] = ()) -> JobSnapshot:
        """The job as it is now, or as it ended if it ends within `wait_seconds` (at most 60). `raw` has also what is
        named in `include`: `input`, `output` (so far, of a job that has not ended) and `attempts`."""
        params: dict[str, Any] = {"wait": wait_seconds} if wait_seconds else {}
        params |= {"include": ",".join(include)} if include else {}
        options = {"params": params, "timeout": timeout_of_wait(wait_seconds)}
        return await self._ask("GET", f"/v1/jobs/{segment(job_id)}", JobSnapshot.of, **options)

    async def wait(
        self,
        job_id: str,
        *,
        timeout: float | None = None,
        on_queue_update: Callable[[QueueUpdate], None] | None = None,
    ) -> JobSnapshot:
        """The job as it ended, whether or not it was completed. Raises TimeoutError; the job goes on."""
        waiting = WaitForEnd(job_id, timeout, on_queue_update, Patience(self._patience_seconds))
        while True:
            try:
                job = await self.get(job_id, wait_seconds=waiting.poll_seconds)
            except ClientError as exc:
                await asyncio.sleep(waiting.patience.delay_after(exc))
                continue
            if waiting.saw(job):
                return job

    async def result(self, job_id: str, *, timeout: float | None = None) -> JobSnapshot:
        """The completed job. Raises JobNotCompleted, with what it had written, or TimeoutError."""
        return completed(await self.wait(job_id, timeout=timeout))

    async def subscribe(
        self,
        prompt: Prompt | None = None,
        *,
        timeout: float | None = None,
        on_queue_update: Callable[[QueueUpdate], None] | None = None,
        **fields: Any,
    ) -> JobSnapshot:
        """Submit a job and wait for its result: `submit`, then `result`."""
        job = await self.submit(prompt, **fields)
        return completed(await self.wait(job.id, timeout=timeout, on_queue_update=on_queue_update))

    async def stream(self, job_id: str, *, starting_after: str | None = None) -> AsyncGenerator[StreamEvent, None]:
        """Every event of the job up to its terminal one, each once, whatever happens to the connection."""
        resumption = Resumption(job_id, starting_after, Patience(self._patience_seconds))
        while not resumption.has_ended:
            failure: ClientError | None = None
            try:
                async with aclosing(self._connect(resumption)) as events:
                    async for event in events:
                        yield event
            except (httpx.HTTPError, Unreadable) as exc:
                failure = self._unreachable(exc)
                failure.__cause__ = exc
            except ClientError as exc:
                failure = exc
            if not resumption.has_ended:
                await asyncio.sleep(resumption.delay_after(failure))

    async def cancel(self, job_id: str) -> JobSnapshot:
        """Ask for the job's end; the text it has produced is kept. A job that has ended is returned unchanged."""
        return await self._ask("POST", f"/v1/jobs/{segment(job_id)}/cancel", JobSnapshot.of)

    async def delete(self, job_id: str) -> None:
        """Erase the job with its input, output and stream. A running job is stopped."""
        await self._ask("DELETE", f"/v1/jobs/{segment(job_id)}", dict)

    # Many jobs

    async def jobs(self, **filters: str | int | None) -> JobPage:
        """A page of jobs without their output, newest first: `status`, `model`, `limit`, `after`, `created_after`."""
        params = {name: value for name, value in filters.items() if value is not None}
        return await self._ask("GET", "/v1/jobs", JobPage.of, params=params)

    async def dead_letters(self, **filters: str | int | None) -> JobPage:
        """A page of failed jobs with their attempts, newest first: `limit`, `after`."""
        params = {name: value for name, value in filters.items() if value is not None}
        return await self._ask("GET", "/v1/dead_letters", JobPage.of, params=params)

    async def replay(self, job_id: str, *, allow_poison: bool = False) -> JobSnapshot:
        """Submit the request of a failed job as a new job, which is returned; repeating it returns the same one."""
        body = {"allow_poison": allow_poison}
        return await self._ask("POST", f"/v1/dead_letters/{segment(job_id)}/replay", JobSnapshot.of, json=body)

    async def map(
        self,
        prompts: Iterable[Prompt],
        *,
        concurrency: int = 16,
        run: str | None = None,
        progress: bool = False,
        **fields: Any,
    ) -> AsyncGenerator[JobSnapshot, None]:
        """The jobs of many prompts as they ended, in the order of the prompts, whether or not they were completed."""
        key_of = keys_of_a_run(run)

        places = asyncio.Semaphore(concurrency)

        async def finish(index: int, prompt: Prompt) -> JobSnapshot:
            async with places:
                job = await self._submit_patiently(prompt, key_of(index), fields)
                return await self.wait(job.id)

        pending: deque[asyncio.Task[JobSnapshot]] = deque()
        try:
            for index, prompt in enumerate(with_bar(prompts) if progress else prompts):
                pending.append(asyncio.create_task(finish(index, prompt)))
                while pending and (pending[0].done() or len(pending) >= NUM_PENDING_PER_PLACE * concurrency):
                    yield await pending[0]
                    pending.popleft()
            while pending:
                yield await pending[0]
                pending.popleft()
        finally:
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)

    async def batch(
        self,
        requests: Path,
        results: Path,
        *,
        completion_window: str = "24h",
        start_timeout: float | None = None,
        run_timeout: float | None = None,
        on_progress: Callable[[BatchSnapshot], None] | None = None,
    ) -> BatchSnapshot:
        """Run a file of requests as a batch, and write its results."""
        with requests.open("rb") as file:
            endpoint = endpoint_of(next(iter(file), b""))
            file.seek(0)
            input_id = await self._ask("POST", "/v1/files", id_of, timeout=None, **upload(file, requests.name))
        body = batch_body(input_id, endpoint, completion_window, start_timeout, run_timeout)
        batch = await self._ask("POST", "/v1/batches", BatchSnapshot.of, json=body)
        return await self.batch_results(batch.id, results, on_progress=on_progress)

    async def batch_results(
        self, batch_id: str, results: Path, *, on_progress: Callable[[BatchSnapshot], None] | None = None
    ) -> BatchSnapshot:
        """Wait for a batch and write its results. Raises ClientError if its file was refused."""
        patience = Patience(self._patience_seconds)
        while True:
            try:
                batch = await self._ask("GET", f"/v1/batches/{segment(batch_id)}", BatchSnapshot.of)
                patience.succeeded()
            except ClientError as exc:
                await asyncio.sleep(patience.delay_after(exc))
                continue
            if on_progress is not None:
                on_progress(batch)
            if not_refused(batch).has_ended:
                break
            await asyncio.sleep(BATCH_POLL_SECONDS)
        with results.open("wb") as file:
            for file_id in filter(None, (batch.output_file_id, batch.error_file_id)):
                await self._download(file_id, file)
        return batch

    async def _download(self, file_id: str, file: BinaryIO) -> None:
        """Append it. What a broken connection left is written over."""
        begin, patience = file.tell(), Patience(self._patience_seconds)
        while True:
            file.seek(begin)
            file.truncate()
            try:
                return await self._copy(f"/v1/files/{segment(file_id)}/content", file)
            except ClientError as exc:
                await asyncio.sleep(patience.delay_after(exc))

    async def _copy(self, path: str, file: BinaryIO) -> None:
        try:
            async with self._http.stream("GET", path) as response:
                if response.is_error:
                    await response.aread()
                    raise error_of(response)
                refuse_redirect(response)
                async for chunk in response.aiter_bytes():
                    file.write(chunk)
        except (httpx.HTTPError, Unreadable) as exc:
            raise self._unreachable(exc) from exc

    # The installation

    async def model_statuses(self) -> list[dict[str, Any]]:
        """Every model with its live workers. Needs an admin key if keys are required."""
        return await self._ask("GET", "/v1/admin/models", rows_of)

    async def model_pulls(self) -> list[dict[str, Any]]:
        """The models that are fetched over HTTP, newest first. Needs an admin key if keys are required."""
        return await self._ask("GET", "/v1/admin/models/pulls", rows_of)

    async def queues(self) -> list[dict[str, Any]]:
        """The queue of every model: who waits for what, and for how long."""
        return await self._ask("GET", "/v1/queue", rows_of)

    async def usage(self, **filters: str | None) -> dict[str, Any]:
        """What was used between `start` and `end`, by `group_by`: the body of GET /v1/usage."""
        params = {name: value for name, value in filters.items() if value is not None}
        return await self._ask("GET", "/v1/usage", dict, params=params)

    async def health(self) -> dict[str, Any]:
        """The body of /health, whatever the status code."""
        try:
            return dict(body_of(await self._http.get("/health", timeout=CONNECT_SECONDS)))
        except (httpx.HTTPError, Unreadable) as exc:
            raise self._unreachable(exc) from exc

    async def _submit_patiently(self, prompt: Prompt, key: str, fields: dict[str, Any]) -> JobSnapshot:
        patience = Patience(float("inf"))
        while True:
            try:
                return await self.submit(prompt, idempotency_key=key, **fields)
            except ClientError as exc:
                await asyncio.sleep(patience.delay_after(exc))

    async def _connect(self, resumption: Resumption) -> AsyncGenerator[StreamEvent, None]:
        parser = EventParser()
        async with self._http.stream(
            "GET", resumption.path, params=resumption.params, timeout=STREAM_TIMEOUT
        ) as response:
            if response.is_error:
                await response.aread()
                raise error_of(response)
            refuse_other_than_events(response)
            self._has_answered = True
            resumption.connected(response.status_code)
            async for line in response.aiter_lines():
                if event := parser.feed(line):
                    yield resumption.saw(event)

    async def _ask(self, method: str, path: str, view: Callable[[Mapping[str, Any]], T], **options: Any) -> T:
        try:
            response = await self._http.request(method, path, **options)
            answer = answer_of(response, view)
        except (httpx.HTTPError, Unreadable) as exc:
            raise self._unreachable(exc) from exc
        except ApiError:
            self._has_answered = True
            raise
        self._has_answered = True
        return answer

    def _unreachable(self, cause: Exception) -> ApiUnreachable:
        return unreachable(self._http.base_url, cause, was_there=self._has_answered)
