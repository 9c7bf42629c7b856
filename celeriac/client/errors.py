"""What the client raises. Every message tells the user what to do."""

from typing import Any

import httpx

from celeriac.client.views import BatchSnapshot, JobSnapshot

MAX_RETRY_AFTER_SECONDS = 60.0


class ClientError(Exception):
    """The base of all errors of the client."""

    @property
    def is_passing(self) -> bool:
        """Whether the same request may succeed in a moment."""
        return False


class ApiUnreachable(ClientError):
    """Nothing answers at the URL, or the connection broke."""

    def __init__(self, message: str, *, was_there: bool) -> None:
        super().__init__(message)
        self.was_there = was_there  # if no API has ever answered at this URL, most likely the URL is wrong

    @property
    def is_passing(self) -> bool:
        return self.was_there


class ApiError(ClientError):
    """The API answered with an error; the message is the API's own, with the field at fault and the code."""

    def __init__(self, status_code: int, body: Any, *, retry_after_seconds: float | None = None) -> None:
        error = body.get("error") if isinstance(body, dict) else None
        error = error if isinstance(error, dict) else {"message": _not_ours(status_code)}
        self.status_code = status_code
        self.code = str(error.get("code") or status_code)
        self.param = error.get("param")
        self.retry_after_seconds = retry_after_seconds  # as the API asks for; None if it does not
        field = f" ({self.param})" if self.param else ""
        super().__init__(f"{error.get('message') or _not_ours(status_code)}{field} [{self.code}]")

    @property
    def is_passing(self) -> bool:
        return self.status_code in (429, 500, 502, 503, 504)


class JobNotCompleted(ClientError):
    """The job failed, expired or was cancelled. `job.text` is what it had written by then."""

    def __init__(self, job: JobSnapshot) -> None:
        super().__init__(f"{job.id} is {job.status}" + (f": {job.error['message']}" if job.error else ""))
        self.job = job


def error_of(response: httpx.Response) -> ApiError:
    """The error of a response that has been read."""
    try:
        body = response.json()
    except ValueError:
        body = None
    return ApiError(response.status_code, body, retry_after_seconds=_seconds(response.headers.get("retry-after")))


def completed(job: JobSnapshot) -> JobSnapshot:
    """The same job. Raises JobNotCompleted."""
    if job.status != "completed":
        raise JobNotCompleted(job)
    return job


def not_refused(batch: BatchSnapshot) -> BatchSnapshot:
    """The same batch. Raises ClientError with the first error of its file, if that was refused."""
    if batch.status == "failed":
        errors = (batch.raw.get("errors") or {}).get("data") or [{}]
        first = errors[0]
        raise ClientError(f"{batch.id} was refused: line {first.get('line')}: {first.get('message')}")
    return batch


def _not_ours(status_code: int) -> str:
    return f"{status_code}, but not in the way of this API: a proxy or another server answers there; check the URL"


def _seconds(text: str | None) -> float | None:
    try:
        return min(max(float(text or ""), 0.0), MAX_RETRY_AFTER_SECONDS)
    except ValueError:
        return None
