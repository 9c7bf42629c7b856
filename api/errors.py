"""Error responses, which have one shape on every route, and the HTTP methods that each path supports.

The shape: {"error": {"message", "type", "param", "code"}, "request_id"}; the routes of Anthropic's API have Anthropic's
(dialects/anthropic_errors.py). `HTTP_BY_CODE` in dialects/errors.py maps each code of domain/errors.py to a status and
a type. Clients retry 408, 409, 429 and 5xx by themselves, so a permanent refusal has none of these statuses, or has
`x-should-retry: false` with it.

The methods of a path are needed for the `Allow` of a 405, for OPTIONS, and for HEAD, which every path with GET
supports.
"""

import logging
import math
import random
from collections.abc import Mapping, Sequence
from contextvars import ContextVar

import orjson
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dialects.errors import OPENAI_ERRORS, ErrorDialect
from domain.errors import (
    CeleriacError,
    DeadlineExceeded,
    DeadlineUnattainable,
    InsufficientQuota,
    InvalidRequest,
    JobFailure,
    JobUnreadable,
    LimitReached,
    NotFound,
    NotOffered,
    Overloaded,
    PermissionDenied,
    RequestTooLarge,
    StorageFull,
    StorageUnavailable,
    TokenBudgetSpent,
)
from observability import describe_exception, request_id_context

log = logging.getLogger(__name__)

ROUTED_METHODS = ("DELETE", "GET", "PATCH", "POST", "PUT")  # those that our routes declare

WHOLE_SERVER = "*"  # the target of an OPTIONS request about the whole server (RFC 9112, 3.2.4)


def methods_of(routes: Sequence[BaseRoute], scope: Scope) -> list[str]:
    """The methods of the path in `scope`, sorted; empty if there is no such path."""
    if scope["path"] == WHOLE_SERVER:
        return sorted({*ROUTED_METHODS, "HEAD", "OPTIONS"})
    methods = _routed_methods(routes, scope)
    if not methods:
        return []
    implied = {"HEAD", "OPTIONS"} if "GET" in methods else {"OPTIONS"}
    return sorted(methods | implied)


def _routed_methods(routes: Sequence[BaseRoute], scope: Scope) -> set[str]:
    """The union over all routes: Starlette reports the methods of the first matching one only. A route whose path is
    exactly this one wins over routes that would take part of the path for an id."""
    own = {
        method
        for route in routes
        if isinstance(route, Route) and route.path == scope["path"]
        for method in route.methods or ()
    }
    if own:
        return own
    tried = [(method, {**scope, "method": method}) for method in ROUTED_METHODS]
    return {method for method, tried_scope in tried if any(_is_match(route, tried_scope) for route in routes)}


def _is_match(route: BaseRoute, scope: Scope) -> bool:
    return route.matches(scope)[0] is Match.FULL


class ImpliedMethods:
    """Answers HEAD as GET without its body (RFC 9110, 9.3.2) where no route does so itself, and OPTIONS with `Allow`
    (9.3.7), for every route."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in ("HEAD", "OPTIONS"):
            await self.app(scope, receive, send)
            return
        routes = scope["app"].router.routes
        methods = methods_of(routes, scope)
        has_own = any(isinstance(route, Route) and _is_match(route, scope) for route in routes)
        if scope["method"] == "HEAD" and "HEAD" in methods and not has_own:
            await self._answer_head(scope, receive, send)
        elif scope["method"] == "OPTIONS" and methods:
            await _answer_options(methods, send)
        else:
            await self.app(scope, receive, send)

    async def _answer_head(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the GET route and send its headers only. The response is then complete, so `receive` reports a disconnect
        and a stream ends."""

        async def send_head(message: Message) -> None:
            if message["type"] == "http.response.start":
                await send(message)
                await send({"type": "http.response.body", "body": b"", "more_body": False})

        as_get = {**scope, "method": "GET"}
        try:
            await self.app(as_get, receive, send_head)
        finally:
            if "route" in as_get:
                scope["route"] = as_get["route"]  # for the metrics


async def _answer_options(methods: Sequence[str], send: Send) -> None:
    headers = [(b"allow", ", ".join(methods).encode())]
    await send({"type": "http.response.start", "status": 204, "headers": headers})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def database_unavailable() -> StorageUnavailable:
    return StorageUnavailable("the database does not answer; retry in a moment", retry_after_seconds=2)


MIN_RETRY_AFTER_SECONDS = 1

MAX_RETRY_AFTER_SECONDS = 60  # the SDKs ignore higher values and use their own short delay instead


class MethodNotAllowed(CeleriacError):
    code = "method_not_allowed"


class UnsupportedMediaType(CeleriacError):
    code = "unsupported_media_type"


class RequestTimeout(CeleriacError):
    code = "request_timeout"
    retryable = True


def register_error_handlers(app: FastAPI) -> None:
    """Replace all default handlers of FastAPI and Starlette. api/middleware.py answers unhandled exceptions."""
    app.add_exception_handler(CeleriacError, _answer_celeriac_error)
    app.add_exception_handler(HTTPException, _answer_http_exception)
    app.add_exception_handler(RequestValidationError, _answer_validation_error)


#: Of the current route; set by whoever sees the request first, so that every layer's refusals have one shape.
error_dialect_context: ContextVar[ErrorDialect] = ContextVar("error_dialect", default=OPENAI_ERRORS)


def error_body(code: str, message: str, param: str | None = None) -> dict[str, object]:
    return error_dialect_context.get().body_of(code, message, param, request_id_context.get())


def json_response(content: object, status_code: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(orjson.dumps(content), status_code, headers, "application/json")


def error_response(exc: CeleriacError) -> Response:
    """`exc` as an HTTP response, with the headers that control whether and when clients retry."""
    status = error_dialect_context.get().http_of(exc.code).status
    headers = {}
    if isinstance(exc, Overloaded):
        headers["retry-after"] = str(_retry_after(exc))
    is_lasting = isinstance(
        exc,
        DeadlineExceeded | JobFailure | JobUnreadable | InsufficientQuota | NotOffered | StorageFull | TokenBudgetSpent,
    )
    if is_lasting and not exc.retryable:
        headers["x-should-retry"] = "false"
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    body = error_body(exc.code, exc.message, exc.param)
    if isinstance(exc, DeadlineUnattainable):
        body["predicted_wait_seconds"] = round(exc.predicted_wait_seconds, 1)
    return Response(orjson.dumps(body), status, headers, "application/json")


def _retry_after(exc: Overloaded) -> int:
    """Whole seconds. A limit says when there will be room: never before, and within reason even if that is long."""
    if isinstance(exc, TokenBudgetSpent):
        return max(MIN_RETRY_AFTER_SECONDS, math.ceil(exc.retry_after_seconds))
    if isinstance(exc, LimitReached):
        later = math.ceil(exc.retry_after_seconds * random.uniform(1.0, 1.2))
        return min(max(later, MIN_RETRY_AFTER_SECONDS), MAX_RETRY_AFTER_SECONDS)
    return jittered_retry_after(exc.retry_after_seconds)


def jittered_retry_after(seconds: float) -> int:
    """Whole seconds, randomised by up to 20% so that clients refused at the same time do not all retry at the same
    time."""
    spread = round(seconds * random.uniform(0.8, 1.2))
    return min(max(spread, MIN_RETRY_AFTER_SECONDS), MAX_RETRY_AFTER_SECONDS)


async def _answer_celeriac_error(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, CeleriacError)
    response = error_response(exc)
    if response.status_code >= 500:
        log.warning("request refused", extra={"code": exc.code, "reason": describe_exception(exc)})
    return response


async def _answer_http_exception(request: Request, exc: Exception) -> Response:
    """Errors that Starlette itself raises: unknown route, wrong method, unreadable request."""
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
        remedy = "remove the trailing slash" if path.endswith("/") else "/openapi.json lists every route"
        return NotFound(f"there is no route {path!r}; {remedy}")
    if exc.status_code == 405:
        return MethodNotAllowed(f"{path} does not support {request.method[:16]}; use {headers['Allow']}")
    if exc.status_code == 413:
        return RequestTooLarge(str(exc.detail))
    if exc.status_code in (401, 403):
        return PermissionDenied(str(exc.detail))
    if exc.status_code < 500:
        return InvalidRequest(str(exc.detail))
    return CeleriacError("the server failed; quote the request id when you report it")


async def _answer_validation_error(request: Request, exc: Exception) -> Response:
    """A query, path or header parameter that FastAPI refused. Its value is not repeated, as it may be a secret."""
    assert isinstance(exc, RequestValidationError)
    first = exc.errors()[0]
    name = ".".join(str(part) for part in first["loc"][1:]) or str(first["loc"][0])
    reason = str(first["msg"]).replace("Input should", "it must").removeprefix("Value error, ")
    return error_response(InvalidRequest(f"{name}: {reason}", param=name))
