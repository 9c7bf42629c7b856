"""Errors as clients see them: the table from the codes of domain/errors.py to HTTP statuses and types."""

import logging
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from dialects.openai_views import View
from domain.errors import (
    CeleriacError,
    DeadlineExceeded,
    JobCancelled,
    JobFailure,
    RunTimeoutExceeded,
    StartTimeoutExceeded,
)
from domain.jobs import JobError, JobStatus, external_id
from storage import job_queries
from storage.job_queries import JobRecord

log = logging.getLogger(__name__)


class HttpError(NamedTuple):
    status: int
    type: str


HTTP_BY_CODE: dict[str, HttpError] = {
    "invalid_value": HttpError(400, "invalid_request_error"),
    "context_length_exceeded": HttpError(400, "invalid_request_error"),
    "unsupported_parameter": HttpError(400, "invalid_request_error"),
    "previous_response_not_found": HttpError(400, "invalid_request_error"),
    "conversation_locked": HttpError(400, "invalid_request_error"),
    "websocket_connection_limit_reached": HttpError(400, "invalid_request_error"),
    "invalid_cursor": HttpError(400, "invalid_request_error"),
    "invalid_json_line": HttpError(400, "invalid_request_error"),
    "missing_required_parameter": HttpError(400, "invalid_request_error"),
    "invalid_url": HttpError(400, "invalid_request_error"),
    "streaming_unsupported": HttpError(400, "invalid_request_error"),
    "idempotency_key_reused": HttpError(422, "invalid_request_error"),
    "poison_request": HttpError(422, "invalid_request_error"),
    "job_not_retryable": HttpError(422, "invalid_request_error"),
    "request_too_large": HttpError(413, "invalid_request_error"),
    "unsupported_media_type": HttpError(415, "invalid_request_error"),
    "method_not_allowed": HttpError(405, "invalid_request_error"),
    "request_timeout": HttpError(408, "invalid_request_error"),
    "invalid_api_key": HttpError(401, "authentication_error"),
    "permission_denied": HttpError(403, "permission_error"),
    "not_found": HttpError(404, "not_found_error"),
    "model_not_found": HttpError(404, "not_found_error"),
    "job_not_found": HttpError(404, "not_found_error"),
    "file_not_found": HttpError(404, "not_found_error"),
    "batch_not_found": HttpError(404, "not_found_error"),
    "conversation_not_found": HttpError(404, "not_found_error"),
    "cursor_expired": HttpError(410, "gone"),
    "insufficient_quota": HttpError(429, "insufficient_quota"),
    "storage_full": HttpError(507, "server_error"),
    "slow_down": HttpError(429, "rate_limit_error"),
    "too_many_queued_jobs": HttpError(429, "rate_limit_error"),
    "limit_reached": HttpError(429, "rate_limit_error"),
    "requests_per_minute_exceeded": HttpError(429, "rate_limit_error"),
    "tokens_per_minute_exceeded": HttpError(429, "rate_limit_error"),
    "too_many_unfinished_jobs": HttpError(429, "rate_limit_error"),
    "too_many_queued_tokens": HttpError(429, "rate_limit_error"),
    "too_many_streams": HttpError(429, "rate_limit_error"),
    "token_budget_spent": HttpError(429, "insufficient_quota"),
    "tokens_per_day_exceeded": HttpError(429, "insufficient_quota"),
    "tokens_per_month_exceeded": HttpError(429, "insufficient_quota"),
    "server_is_overloaded": HttpError(503, "service_unavailable_error"),
    "no_workers": HttpError(503, "service_unavailable_error"),
    "deadline_unattainable": HttpError(503, "service_unavailable_error"),
    "model_unavailable": HttpError(503, "service_unavailable_error"),
    "storage_unavailable": HttpError(503, "service_unavailable_error"),
    "deadline_exceeded": HttpError(504, "server_error"),
    "start_timeout_exceeded": HttpError(504, "server_error"),
    "run_timeout_exceeded": HttpError(504, "server_error"),
    "job_unreadable": HttpError(500, "server_error"),
    "job_cancelled": HttpError(410, "gone"),
    "job_failed": HttpError(500, "server_error"),
    "engine_error": HttpError(500, "server_error"),
    "poison_job": HttpError(500, "server_error"),
    "out_of_memory": HttpError(500, "server_error"),
    "worker_lost": HttpError(502, "server_error"),
    "model_revision_gone": HttpError(502, "server_error"),
    "not_implemented": HttpError(501, "invalid_request_error"),
    "server_error": HttpError(500, "server_error"),
}


class ErrorDialect(NamedTuple):
    """How a family of routes writes its errors: status and type by code; and the body, of code, message, param and the
    request's id."""

    http_of: Callable[[str], HttpError]
    body_of: Callable[[str, str, str | None, str | None], dict[str, Any]]


def _openai_error_body(code: str, message: str, param: str | None, request_id: str | None) -> dict[str, Any]:
    error = {"message": message, "type": HTTP_BY_CODE[code].type, "param": param, "code": code}
    return {"error": error, "request_id": request_id}


OPENAI_ERRORS: Final = ErrorDialect(HTTP_BY_CODE.__getitem__, _openai_error_body)


class JobErrorView(View):
    code: str
    message: str
    type: str
    retryable: bool


def job_error_view(error: JobError) -> JobErrorView:
    """A job's stored error as clients see it. Codes of other versions, which are not in the table, are server
    errors."""
    code = error.code if error.code in HTTP_BY_CODE else "server_error"
    return {"code": error.code, "message": error.message, "type": HTTP_BY_CODE[code].type, "retryable": error.retryable}


_LATE = "its deadline passed before it was done"


def refuse_unfinished(record: JobRecord) -> None:
    """Raises the CeleriacError that says why a terminal job has no complete output."""
    job = record.job
    name = external_id(job.id)
    partial = "" if record.result is None else f"; its partial output is at /v1/jobs/{name}/output"
    if job.status is JobStatus.CANCELLED:
        raise JobCancelled(f"{name} was cancelled{partial}")
    if job.status is JobStatus.EXPIRED:
        classes = {cls.code: cls for cls in (StartTimeoutExceeded, RunTimeoutExceeded)}
        cls = classes.get(job.error.code if job.error is not None else "", DeadlineExceeded)
        reason = job.error.message if cls is not DeadlineExceeded and job.error is not None else _LATE
        raise cls(f"{name} has expired, as {reason}{partial}")
    if job.status is JobStatus.FAILED:
        raise _failure(record)
    if record.result is None:
        raise job_queries.unreadable(job.id)


def _failure(record: JobRecord) -> CeleriacError:
    error = record.job.error
    classes = {JobFailure.code: JobFailure} | {cls.code: cls for cls in JobFailure.__subclasses__()}
    cls = classes.get(error.code if error is not None else JobFailure.code, JobFailure)
    return cls(error.message if error is not None else "the job failed without an error message; report its id")
