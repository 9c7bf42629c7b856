"""The client for threads."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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


class Client:
    """A connection to one API, for any number of threads.

    Every method raises ApiUnreachable if nothing answers and ApiError if the API refuses. Jobs don't depend on the
    client: one that dies, or stops waiting, finds its jobs again by their ids.

    ```python
    with Client("http://127.0.0.1:8000") as client:
        print(client.subscribe("Once upon a time", max_tokens=50).text)
    ```
    """

    def __init__(
        self, url: str | None = None, key: str | None = None, *, patience_seconds: float = PATIENCE_SECONDS
    ) -> None:
        """By default CELERIAC_API_URL and CELERIAC_API_KEY. Raises ClientError if no URL is named.

        For `patience_seconds`, what fails because the API is away or overloaded is tried again.
        """
        self.url = url_of_api(url)
        self._http = httpx.Client(**http_options(self.url, key))
        self._patience_seconds = patience_seconds
        self._has_answered = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    # One job

    def submit(self, prompt: Prompt | None = None, *, idempotency_key: str | None = None, **fields: Any) -> JobSnapshot:
        """Submit a job and return it as accepted: from then on it runs to its end, whatever becomes of this client.

        `prompt` is a text to continue, or the messages of a chat to answer; without it, give `prompt_token_ids`, or
        `inputs` for embeddings. Fields of the job (`model`, `tools`, `priority`, `metadata`, `deadline`,
        `start_timeout`, `run_timeout`, `webhook`, …)
        and sampling parameters (`max_tokens`, `temperature`, `stop`, `seed`, …) are named arguments. The default model
        is the installation's. If the connection drops, the request is sent again; its idempotency key keeps it one job.

        ```python
        job = client.submit([{"role": "user", "content": "What is 17 + 25?"}], max_tokens=20, temperature=0)
        ```
        """
        body = job_fields(prompt, fields)
        headers = {"idempotency-key": idempotency_key or new_idempotency_key()}
        patience = Patience(self._patience_seconds)
        while True:
            try:
                return self._ask("POST", "/v1/jobs", JobSnapshot.of, json=body, headers=headers)
            except ClientError as exc:
                if not exc.is_unreached:
                    raise
                time.sleep(patience.delay_after(exc))

    def get(self, job_id: str, *, wait_seconds: int = 0, include: Sequence[str] = ()) -> JobSnapshot:
        """The job as it is now, or as it ended if it ends within `wait_seconds` (at most 60). `raw` has also what is
        named in `include`: `input`, `output` (so far, of a job that has not ended) and `attempts`."""
        params: dict[str, Any] = {"wait": wait_seconds} if wait_seconds else {}
        params |= {"include": ",".join(include)} if include else {}
        options = {"params": params, "timeout": timeout_of_wait(wait_seconds)}
        return self._ask("GET", f"/v1/jobs/{segment(job_id)}", JobSnapshot.of, **options)

    def wait(
        self,
        job_id: str,
        *,
        timeout: float | None = None,
        on_queue_update: Callable[[QueueUpdate], None] | None = None,
    ) -> JobSnapshot:
        """The job as it ended, whether or not it was completed. Raises TimeoutError after `timeout` seconds; the job
        goes on. `on_queue_update` is called whenever its place in the queue changes, and when it starts."""
        waiting = WaitForEnd(job_id, timeout, on_queue_update, Patience(self._patience_seconds))
        while True:
            try:
                job = self.get(job_id, wait_seconds=waiting.poll_seconds)
            except ClientError as exc:
                time.sleep(waiting.patience.delay_after(exc))
                continue
            if waiting.saw(job):
                return job

    def result(self, job_id: str, *, timeout: float | None = None) -> JobSnapshot:
        """The completed job. Raises JobNotCompleted, with what it had written, or TimeoutError."""
        return completed(self.wait(job_id, timeout=timeout))

    def subscribe(
        self,
        prompt: Prompt | None = None,
        *,
        timeout: float | None = None,
        on_queue_update: Callable[[QueueUpdate], None] | None = None,
        **fields: Any,
    ) -> JobSnapshot:
        """Submit a job and wait for its result: `submit`, then `result`.

        ```python
        job = client.subscribe("Once upon a time", max_tokens=50, on_queue_update=lambda at: print(at.position))
        ```
        """
        job = self.submit(prompt, **fields)
        return completed(self.wait(job.id, timeout=timeout, on_queue_update=on_queue_update))

    def stream(self, job_id: str, *, starting_after: str | None = None) -> Iterator[StreamEvent]:
        """Every event of the job up to its terminal one, each once, from the start or after the event with the id
        `starting_after`. If the connection drops, continues after the last one. A `job.reset` voids all text before it.

        ```python
        for event in client.stream(job.id):
            print(event.text, end="", flush=True)
        ```
        """
        resumption = Resumption(job_id, starting_after, Patience(self._patience_seconds))
        while not resumption.has_ended:
            failure: ClientError | None = None
            try:
                yield from self._connect(resumption)
            except (httpx.HTTPError, Unreadable) as exc:
                failure = self._unreachable(exc)
                failure.__cause__ = exc
            except ClientError as exc:
                failure = exc
            if not resumption.has_ended:
                time.sleep(resumption.delay_after(failure))

    def cancel(self, job_id: str) -> JobSnapshot:
        """Ask for the job's end; the text it has produced is kept. A job that has ended is returned unchanged."""
        return self._ask("POST", f"/v1/jobs/{segment(job_id)}/cancel", JobSnapshot.of)

    def delete(self, job_id: str) -> None:
        """Erase the job with its input, output and stream. A running job is stopped."""
        self._ask("DELETE", f"/v1/jobs/{segment(job_id)}", dict)

    # Many jobs

    def jobs(self, **filters: str | int | None) -> JobPage:
        """A page of jobs without their output, newest first: `status`, `model`, `limit`, `after`, `created_after`."""
        params = {name: value for name, value in filters.items() if value is not None}
        return self._ask("GET", "/v1/jobs", JobPage.of, params=params)

    def dead_letters(self, **filters: str | int | None) -> JobPage:
        """A page of failed jobs with their attempts, newest first: `limit`, `after`."""
        params = {name: value for name, value in filters.items() if value is not None}
        return self._ask("GET", "/v1/dead_letters", JobPage.of, params=params)

    def replay(self, job_id: str, *, allow_poison: bool = False) -> JobSnapshot:
        """Submit the request of a failed job as a new job, which is returned; repeating it returns the same one."""
        body = {"allow_poison": allow_poison}
        return self._ask("POST", f"/v1/dead_letters/{segment(job_id)}/replay", JobSnapshot.of, json=body)

    def map(
        self,
        prompts: Iterable[Prompt],
        *,
        concurrency: int = 16,
        run: str | None = None,
        progress: bool = False,
        **fields: Any,
    ) -> Iterator[JobSnapshot]:
        """The jobs of many prompts as they ended, in the order of the prompts, whether or not they were completed.

        At most `concurrency` jobs are under way, and prompts are taken from the iterable as they are needed. An
        overloaded API is waited for. Give the `run` a name, and repeating it after a crash finds the jobs that it had
        submitted instead of submitting them again. `progress` shows a bar on a terminal.

        ```python
        for job in client.map(prompts, model="celeriac-mini", max_tokens=50, run="stories-1", progress=True):
            print(job.text if job.status == "completed" else job.error)
        ```
        """
        key_of = keys_of_a_run(run)

        def finish(index: int, prompt: Prompt) -> JobSnapshot:
            job = self._submit_patiently(prompt, key_of(index), fields)
            return self.wait(job.id)

        pool = ThreadPoolExecutor(concurrency, thread_name_prefix="celeriac-map")
        pending: deque[Future[JobSnapshot]] = deque()
        try:
            for index, prompt in enumerate(with_bar(prompts) if progress else prompts):
                pending.append(pool.submit(finish, index, prompt))
                while pending and (pending[0].done() or len(pending) >= NUM_PENDING_PER_PLACE * concurrency):
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def batch(
        self,
        requests: Path,
        results: Path,
        *,
        completion_window: str = "24h",
        start_timeout: float | None = None,
        run_timeout: float | None = None,
        on_progress: Callable[[BatchSnapshot], None] | None = None,
    ) -> BatchSnapshot:
        """Run a file of requests as a batch, and write its results. Failed lines come last in `results`. Each line may
        wait for `start_timeout` and run for `run_timeout` seconds, unless it has its own.

        Waits for the batch, which needs neither this client nor its connection: `batch_results` fetches it later.
        """
        with requests.open("rb") as file:
            endpoint = endpoint_of(next(iter(file), b""))
            file.seek(0)
            input_id = self._ask("POST", "/v1/files", id_of, timeout=None, **upload(file, requests.name))
        body = batch_body(input_id, endpoint, completion_window, start_timeout, run_timeout)
        batch = self._ask("POST", "/v1/batches", BatchSnapshot.of, json=body)
        return self.batch_results(batch.id, results, on_progress=on_progress)

    def batch_results(
        self, batch_id: str, results: Path, *, on_progress: Callable[[BatchSnapshot], None] | None = None
    ) -> BatchSnapshot:
        """Wait for a batch and write its results. Raises ClientError if its file was refused."""
        patience = Patience(self._patience_seconds)
        while True:
            try:
                batch = self._ask("GET", f"/v1/batches/{segment(batch_id)}", BatchSnapshot.of)
                patience.succeeded()
            except ClientError as exc:
                time.sleep(patience.delay_after(exc))
                continue
            if on_progress is not None:
                on_progress(batch)
            if not_refused(batch).has_ended:
                break
            time.sleep(BATCH_POLL_SECONDS)
        with results.open("wb") as file:
            for file_id in filter(None, (batch.output_file_id, batch.error_file_id)):
                self._download(file_id, file)
        return batch

    def _download(self, file_id: str, file: BinaryIO) -> None:
        """Append it. What a broken connection left is written over."""
        begin, patience = file.tell(), Patience(self._patience_seconds)
        while True:
            file.seek(begin)
            file.truncate()
            try:
                return self._copy(f"/v1/files/{segment(file_id)}/content", file)
            except ClientError as exc:
                time.sleep(patience.delay_after(exc))

    def _copy(self, path: str, file: BinaryIO) -> None:
        try:
            with self._http.stream("GET", path) as response:
                if response.is_error:
                    response.read()
                    raise error_of(response)
                refuse_redirect(response)
                for chunk in response.iter_bytes():
                    file.write(chunk)
        except (httpx.HTTPError, Unreadable) as exc:
            raise self._unreachable(exc) from exc

    # The installation

    def model_statuses(self) -> list[dict[str, Any]]:
        """Every model with its live workers. Needs an admin key if keys are required."""
        return self._ask("GET", "/v1/admin/models", rows_of)

    def model_pulls(self) -> list[dict[str, Any]]:
        """The models that are fetched over HTTP, newest first. Needs an admin key if keys are required."""
        return self._ask("GET", "/v1/admin/models/pulls", rows_of)

    def queues(self) -> list[dict[str, Any]]:
        """The queue of every model: who waits for what, and for how long."""
        return self._ask("GET", "/v1/queue", rows_of)

    def usage(self, **filters: str | None) -> dict[str, Any]:
        """What was used between `start` and `end`, by `group_by`: the body of GET /v1/usage."""
        params = {name: value for name, value in filters.items() if value is not None}
        return self._ask("GET", "/v1/usage", dict, params=params)

    def health(self) -> dict[str, Any]:
        """The body of /health, whatever the status code."""
        try:
            return dict(body_of(self._http.get("/health", timeout=CONNECT_SECONDS)))
        except (httpx.HTTPError, Unreadable) as exc:
            raise self._unreachable(exc) from exc

    def _submit_patiently(self, prompt: Prompt, key: str, fields: dict[str, Any]) -> JobSnapshot:
        patience = Patience(float("inf"))
        while True:
            try:
                return self.submit(prompt, idempotency_key=key, **fields)
            except ClientError as exc:
                time.sleep(patience.delay_after(exc))

    def _connect(self, resumption: Resumption) -> Iterator[StreamEvent]:
        parser = EventParser()
        with self._http.stream("GET", resumption.path, params=resumption.params, timeout=STREAM_TIMEOUT) as response:
            if response.is_error:
                response.read()
                raise error_of(response)
            refuse_other_than_events(response)
            self._has_answered = True
            resumption.connected(response.status_code)
            for line in response.iter_lines():
                if event := parser.feed(line):
                    yield resumption.saw(event)

    def _ask(self, method: str, path: str, view: Callable[[Mapping[str, Any]], T], **options: Any) -> T:
        try:
            response = self._http.request(method, path, **options)
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
