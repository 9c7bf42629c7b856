"""What the client raises. Every message tells the user what to do."""

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import httpx

from celeriac.client.answers import Unreadable, items_of, object_of
from celeriac.client.views import BatchSnapshot, JobSnapshot

MAX_RETRY_AFTER_SECONDS = 60.0
NO_CONTENT = 204

T = TypeVar("T")


class ClientError(Exception):
    """The base of all errors of the client."""

    @property
    def is_passing(self) -> bool:
        """Whether the same request may succeed in a moment."""
        return False

    @property
    def is_unreached(self) -> bool:
        """Whether no API has said anything."""
        return False


class ApiUnreachable(ClientError):
    """Nothing answers at the URL, or the connection broke."""

    def __init__(self, message: str, *, was_there: bool) -> None:
        super().__init__(message)
        self.was_there = was_there  # if no API has ever answered at this URL, most likely the URL is wrong

    @property
    def is_passing(self) -> bool:
        return self.was_there

    @property
    def is_unreached(self) -> bool:
        return True


class ApiError(ClientError):
    """The API answered with an error; the message is the API's own, with the field at fault and the code."""

    def __init__(self, status_code: int, body: Any, *, retry_after_seconds: float | None = None) -> None:
        error = body.get("error") if isinstance(body, dict) else None
        self._is_ours = isinstance(error, dict)
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

    @property
    def is_unreached(self) -> bool:
        """Whether a proxy says that it found no API behind it, as while the only one restarts."""
        return self.status_code in (502, 503, 504) and not self._is_ours


class UnexpectedAnswer(ApiUnreachable):
    """Something answers at the URL, but not as this API does: a proxy's page, or another server."""


class JobNotCompleted(ClientError):
    """The job failed, expired or was cancelled. `job.text` is what it had written by then."""

    def __init__(self, job: JobSnapshot) -> None:
        super().__init__(f"{job.id} is {job.status}" + (f": {job.error.get('message')}" if job.error else ""))
        self.job = job


def error_of(response: httpx.Response) -> ApiError:
    """The error of a response that has been read."""
    try:
        body = response.json()
    except (ValueError, RecursionError):
        body = None
    return ApiError(response.status_code, body, retry_after_seconds=_seconds(response.headers.get("retry-after")))


def answer_of(response: httpx.Response, view: Callable[[Mapping[str, Any]], T]) -> T:
    """What `view` makes of the answer, which has been read. Raises ApiError or Unreadable."""
    if response.is_error:
        raise error_of(response)
    return view(body_of(response))


def body_of(response: httpx.Response) -> Mapping[str, Any]:
    """Its JSON, whatever the status. Raises Unreadable."""
    refuse_redirect(response)
    try:
        body = response.json()
    except (ValueError, RecursionError) as exc:
        kind = response.headers.get("content-type", "no type")
        raise Unreadable(f"answers {response.status_code} with {kind} instead of JSON") from exc
    return object_of(body)


def refuse_redirect(response: httpx.Response) -> None:
    """They are not followed: the key would go to whoever the other server is. Raises Unreadable."""
    if not response.is_redirect:
        return
    if target := response.headers.get("location"):
        raise Unreadable(f"redirects to {target[:200]}, which may be the URL to name instead")
    raise Unreadable(f"answers {response.status_code}, a redirect that does not say where to")


def refuse_other_than_events(response: httpx.Response) -> None:
    """Raises Unreadable unless it is a stream of events, or says that there are none (204)."""
    refuse_redirect(response)
    kind = response.headers.get("content-type", "no type")
    if response.status_code != NO_CONTENT and not kind.startswith("text/event-stream"):
        raise Unreadable(f"answers {response.status_code} with {kind} instead of events")


def completed(job: JobSnapshot) -> JobSnapshot:
    """The same job. Raises JobNotCompleted."""
    if job.status != "completed":
        raise JobNotCompleted(job)
    return job


def not_refused(batch: BatchSnapshot) -> BatchSnapshot:
    """The same batch. Raises ClientError with the first error of its file, if that was refused."""
    if batch.status == "failed":
        errors = batch.raw.get("errors") or {}
        first = (items_of(errors, "data") or [{}])[0] if "data" in errors else {}
        raise ClientError(f"{batch.id} was refused: line {first.get('line')}: {first.get('message')}")
    return batch


def _not_ours(status_code: int) -> str:
    return f"{status_code}, but not in the way of this API; a proxy or another server answers there; check the URL"


def _seconds(text: str | None) -> float | None:
    try:
        seconds = float(text or "")
    except ValueError:
        return None
    return None if math.isnan(seconds) else min(max(seconds, 0.0), MAX_RETRY_AFTER_SECONDS)
