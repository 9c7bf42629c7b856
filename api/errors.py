"""Every error leaves in one shape, on every route: {"error": {"message", "type", "param", "code"}, "request_id"}.

`HTTP_BY_CODE` is the one table from a code of `domain.errors` to a status and a type. Clients retry 408, 409, 429 and
5xx by themselves, so a lasting refusal never carries one of those.
"""

import logging
import random
from collections.abc import Mapping
from typing import NamedTuple

import orjson
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from api.methods import methods_of
from domain.errors import (
    CeleriacError,
    DeadlineExceeded,
    InsufficientQuota,
    InvalidRequest,
    JobFailure,
    NotFound,
    NotOffered,
    Overloaded,
    PermissionDenied,
    RequestTooLarge,
    StorageFull,
)
from domain.jobs import JobError
from observability import describe_exception, request_id_context

log = logging.getLogger(__name__)

MIN_RETRY_AFTER_SECONDS = 1
MAX_RETRY_AFTER_SECONDS = 60  # the SDKs ignore more and fall back to their own short delay


class MethodNotAllowed(CeleriacError):
    code = "method_not_allowed"


class UnsupportedMediaType(CeleriacError):
    code = "unsupported_media_type"


class RequestTimeout(CeleriacError):
    code = "request_timeout"
    retryable = True


class HttpError(NamedTuple):
    status: int
    type: str


HTTP_BY_CODE: dict[str, HttpError] = {
    "invalid_value": HttpError(400, "invalid_request_error"),
    "context_length_exceeded": HttpError(400, "invalid_request_error"),
    "unsupported_parameter": HttpError(400, "invalid_request_error"),
    "previous_response_not_found": HttpError(400, "invalid_request_error"),
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
    "cursor_expired": HttpError(410, "gone"),
    "insufficient_quota": HttpError(429, "insufficient_quota"),
    "storage_full": HttpError(507, "server_error"),
    "slow_down": HttpError(429, "rate_limit_error"),
    "too_many_queued_jobs": HttpError(429, "rate_limit_error"),
    "server_is_overloaded": HttpError(503, "service_unavailable_error"),
    "no_workers": HttpError(503, "service_unavailable_error"),
    "model_unavailable": HttpError(503, "service_unavailable_error"),
    "storage_unavailable": HttpError(503, "service_unavailable_error"),
    "deadline_exceeded": HttpError(504, "server_error"),
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


def register_error_handlers(app: FastAPI) -> None:
    """Replace every default of FastAPI and Starlette. Unhandled exceptions are the business of api/middleware.py."""
    app.add_exception_handler(CeleriacError, _answer_celeriac_error)
    app.add_exception_handler(HTTPException, _answer_http_exception)
    app.add_exception_handler(RequestValidationError, _answer_validation_error)


def error_body(code: str, message: str, param: str | None = None) -> dict[str, object]:
    error = {"message": message, "type": HTTP_BY_CODE[code].type, "param": param, "code": code}
    return {"error": error, "request_id": request_id_context.get()}


def job_error_body(error: JobError) -> dict[str, object]:
    """A job's stored error as clients see it. A code that this version does not know is a server error."""
    code = error.code if error.code in HTTP_BY_CODE else "server_error"
    return {"code": error.code, "message": error.message, "type": HTTP_BY_CODE[code].type, "retryable": error.retryable}


def error_response(exc: CeleriacError) -> Response:
    """`exc` as HTTP, with the headers that steer the retries of clients."""
    status = HTTP_BY_CODE[exc.code].status
    headers = {}
    if isinstance(exc, Overloaded):
        headers["retry-after"] = str(jittered_retry_after(exc.retry_after_seconds))
    is_lasting = isinstance(exc, DeadlineExceeded | JobFailure | InsufficientQuota | NotOffered | StorageFull)
    if is_lasting and not exc.retryable:
        headers["x-should-retry"] = "false"
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    body = orjson.dumps(error_body(exc.code, exc.message, exc.param))
    return Response(body, status, headers, "application/json")


def jittered_retry_after(seconds: float) -> int:
    """Whole seconds, spread by a fifth so that clients refused together do not come back together."""
    spread = round(seconds * random.uniform(0.8, 1.2))
    return min(max(spread, MIN_RETRY_AFTER_SECONDS), MAX_RETRY_AFTER_SECONDS)


async def _answer_celeriac_error(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, CeleriacError)
    response = error_response(exc)
    if response.status_code >= 500:
        log.warning("request refused", extra={"code": exc.code, "reason": describe_exception(exc)})
    return response


async def _answer_http_exception(request: Request, exc: Exception) -> Response:
    """What Starlette itself raises: no such route, wrong method, unreadable request."""
    assert isinstance(exc, HTTPException)
    headers = dict(exc.headers or {})
    if exc.status_code == 405:
        headers["Allow"] = ", ".join(methods_of(request.app.router.routes, request.scope))
    response = error_response(_as_celeriac_error(request, exc, headers))
    response.headers.update(headers)
    return response


def _as_celeriac_error(request: Request, exc: HTTPException, headers: Mapping[str, str]) -> CeleriacError:
    path = request.url.path[:128]
    if exc.status_code == 404:
        remedy = "leave out the slash at its end" if path.endswith("/") else "/openapi.json lists every route"
        return NotFound(f"there is no {path!r} here; {remedy}")
    if exc.status_code == 405:
        return MethodNotAllowed(f"{path} does not answer {request.method[:16]}; use {headers['Allow']}")
    if exc.status_code == 413:
        return RequestTooLarge(str(exc.detail))
    if exc.status_code in (401, 403):
        return PermissionDenied(str(exc.detail))
    if exc.status_code < 500:
        return InvalidRequest(str(exc.detail))
    return CeleriacError("the server failed; quote the request id when you report it")


async def _answer_validation_error(request: Request, exc: Exception) -> Response:
    """A query, path or header parameter that FastAPI refused. The value stays out: it may be a secret."""
    assert isinstance(exc, RequestValidationError)
    first = exc.errors()[0]
    name = ".".join(str(part) for part in first["loc"][1:]) or str(first["loc"][0])
    reason = str(first["msg"]).replace("Input should", "it must").removeprefix("Value error, ")
    return error_response(InvalidRequest(f"{name}: {reason}", param=name))
