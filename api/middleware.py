"""The middleware around every request: request ids, metrics, CORS, origin checks and a limit on the body.

Plain ASGI, because Starlette's BaseHTTPMiddleware puts a task and a queue between a stream and its client.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Collection, Mapping

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.errors import error_dialect_context, error_response
from api.limit_headers import anthropic_limit_headers, openai_limit_headers
from api.model_queues import HEADER_BY_FIELD, WAITING_FOR_HEADER
from api.request_headers import header_of
from api.services import take_start
from dialects.anthropic_errors import ANTHROPIC_ERRORS
from dialects.errors import OPENAI_ERRORS, ErrorDialect
from dialects.fields import HEADER, header_value, ignored_fields_context
from domain.addresses import OriginPolicy
from domain.errors import CeleriacError, InvalidRequest, PermissionDenied, RequestTooLarge, ServerOverloaded
from domain.limits import RequestStandings, standings_context
from metrics import http_request_seconds, http_requests_in_progress, http_requests_total, labelled
from observability import request_id_context, submitted_job_ids
from tasks.tracing import RequestSpan

log = logging.getLogger(__name__)

MAX_AGE_SECONDS = 600  # how long a browser may cache a preflight

#: The response headers that scripts of other origins may read.
EXPOSED_HEADERS = (
    "x-job-id",
    "x-job-ids",
    "x-request-id",
    "request-id",
    "x-ignored-fields",
    "x-retry-attached",
    "x-should-retry",
    "retry-after",
    "idempotent-replayed",
    "location",
    "etag",
    "stream-next-offset",
    "stream-cursor",
    "stream-up-to-date",
    "stream-closed",
    "openai-processing-ms",
    "openai-version",
    "x-celeriac-cache",
    *(name for name, _ in HEADER_BY_FIELD.values()),
    WAITING_FOR_HEADER,
    "x-ratelimit-limit-requests",
    "x-ratelimit-remaining-requests",
    "x-ratelimit-reset-requests",
    "x-ratelimit-limit-tokens",
    "x-ratelimit-remaining-tokens",
    "x-ratelimit-reset-tokens",
    "anthropic-ratelimit-requests-limit",
    "anthropic-ratelimit-requests-remaining",
    "anthropic-ratelimit-requests-reset",
    "anthropic-ratelimit-tokens-limit",
    "anthropic-ratelimit-tokens-remaining",
    "anthropic-ratelimit-tokens-reset",
)


JUDGED_HEADERS = frozenset({b"host", b"origin", b"sec-fetch-site", b"sec-fetch-mode", b"sec-fetch-dest"})


class OriginGuard:
    """Refuses requests to foreign hosts and from foreign web pages with 403. Used only if no key is required: otherwise
    a page would have to know one."""

    def __init__(self, app: ASGIApp, policy: OriginPolicy) -> None:
        self.app = app
        self._policy = policy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket") and (refusal := self._refusal(scope)) is not None:
            await refusal(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _refusal(self, scope: Scope) -> Response | None:
        judged = [header for header in scope["headers"] if header[0] in JUDGED_HEADERS]
        names = [name for name, _ in judged]
        num_hosts = names.count(b"host")
        if num_hosts != 1 and (num_hosts or scope["http_version"] != "1.0"):  # RFC 9112, section 3.2
            return error_response(InvalidRequest(f"there are {num_hosts} Host headers; send exactly one"))
        if names.count(b"origin") > 1:
            return error_response(InvalidRequest("there are several Origin headers; send at most one"))
        headers = {name.decode(): value.decode("latin-1") for name, value in reversed(judged)}  # of a name, the first
        # A WebSocket begins as a GET.
        reason = self._policy.refusal(scope.get("method", "GET"), headers)
        return None if reason is None else error_response(PermissionDenied(reason))


class Cors(CORSMiddleware):
    """Starlette's CORS middleware for the configured origins; refused preflights get our error body."""

    def __init__(self, app: ASGIApp, origins: Collection[str]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=("DELETE", "GET", "HEAD", "OPTIONS", "POST"),
            allow_headers=("*",),  # whatever is asked for, as new versions of the SDKs send new headers
            allow_private_network=True,
            expose_headers=EXPOSED_HEADERS,
            max_age=MAX_AGE_SECONDS,
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        answer = super().preflight_response(request_headers)
        if answer.status_code < 400:
            return answer
        method = request_headers["access-control-request-method"][:16]
        refusal = error_response(
            PermissionDenied(
                f"pages from {request_headers['origin'][:80]!r} may not send {method} here; "
                "the origin must be in CELERIAC_CORS_ORIGINS and the method one that the API uses"
            )
        )
        refusal.headers["vary"] = answer.headers["vary"]
        return refusal


CLIENT_CLOSED_REQUEST = 499  # for the metrics only; never sent


class RequestContext:
    """Gives each request an id, for its headers, log lines and errors; measures it; answers exceptions nobody
    caught."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        places = [value for name, value in scope["headers"] if name == b"traceparent"]
        span = RequestSpan(places[0].decode("latin-1") if len(places) == 1 else None)
        request_id = f"req_{secrets.token_hex(12)}"
        token = request_id_context.set(request_id)
        submitted_job_ids.set([])
        standings = RequestStandings()
        standings_context.set(standings)
        ignored: list[str] = []
        ignored_token = ignored_fields_context.set(ignored)
        dialect = dialect_of(scope)
        dialect_token = error_dialect_context.set(dialect)
        answer = _Answer(send, request_id, ignored, standings, dialect)
        started = time.perf_counter()
        http_requests_in_progress.inc()
        try:
            await take_start(scope)
            await self.app(scope, receive, answer.send)
        except ServerOverloaded as exc:  # too many wait to begin: there is no route yet that would answer it
            await answer.send_whole(exc, scope, receive)
        except ClientDisconnect:
            answer.status = answer.status or CLIENT_CLOSED_REQUEST
        except asyncio.CancelledError:
            if answer.status is not None:
                raise
            await answer.send_whole(_stopping(), scope, receive)
        except Exception:  # outermost: whatever it is, the client gets the usual error body and no details
            log.exception("request failed", extra={"method": scope["method"], "route": _route_of(scope)})
            if answer.status is None:  # else part of the answer is out, and uvicorn closes the connection
                await answer.send_whole(_internal_error(), scope, receive)
        finally:
            http_requests_in_progress.dec()
            _count(scope, answer.status or CLIENT_CLOSED_REQUEST, time.perf_counter() - started)
            span.end(scope["method"], _route_of(scope), answer.status or CLIENT_CLOSED_REQUEST)
            request_id_context.reset(token)
            ignored_fields_context.reset(ignored_token)
            error_dialect_context.reset(dialect_token)


class _Answer:
    def __init__(
        self,
        send: Send,
        request_id: str,
        ignored: list[str],
        standings: RequestStandings,
        dialect: ErrorDialect,
    ) -> None:
        """`ignored` is filled while the body is parsed: the fields that were dropped; `standings` as the caller is
        known, and jobs are accepted or refused."""
        names = (b"x-request-id", b"request-id") if dialect is ANTHROPIC_ERRORS else (b"x-request-id",)
        self._send = send
        self._id_headers = [(name, request_id.encode()) for name in names]
        self._ignored = ignored
        self._standings = standings
        self._limit_headers = anthropic_limit_headers if dialect is ANTHROPIC_ERRORS else openai_limit_headers
        self.status: int | None = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), *self._id_headers, *self._ignored_header()]
            if standings := self._standings.all:
                message["headers"] += self._limit_headers(standings)
        await self._send(message)

    def _ignored_header(self) -> list[tuple[bytes, bytes]]:
        return [(HEADER.encode(), header_value(self._ignored).encode())] if self._ignored else []

    async def send_whole(self, exc: CeleriacError, scope: Scope, receive: Receive) -> None:
        response = error_response(exc)
        if job_ids := submitted_job_ids.get():
            response.headers["x-job-id"] = job_ids[-1]
        await response(scope, receive, self.send)


def dialect_of(scope: Scope) -> ErrorDialect:
    """Anthropic's on the routes that only it has, and where both have one, for who names a version of its API."""
    path: str = scope["path"]
    is_shared = path.startswith("/v1/models") and b"anthropic-version" in dict(scope["headers"])
    is_own = path == "/v1/messages" or path.startswith("/v1/messages/")
    return ANTHROPIC_ERRORS if is_own or is_shared else OPENAI_ERRORS


def _internal_error() -> CeleriacError:
    return CeleriacError(f"the server failed; quote the request id when you report it{_accepted_job()}")


def _stopping() -> CeleriacError:
    """For a request that was not answered within the grace period of a stopping server."""
    return ServerOverloaded(f"this server is stopping; retry in a moment{_accepted_job()}", retry_after_seconds=2)


def _accepted_job() -> str:
    job_ids = submitted_job_ids.get()
    return f"; {job_ids[-1]} may have been accepted: check /v1/jobs/{job_ids[-1]} first" if job_ids else ""


def _route_of(scope: Scope) -> str:
    """The path template, as ids must not become metric labels."""
    return getattr(scope.get("route"), "path_format", "unmatched")


def _count(scope: Scope, status: int, seconds: float) -> None:
    route = _route_of(scope)
    labelled(http_requests_total, scope["method"], route, str(status)).inc()
    labelled(http_request_seconds, route).observe(seconds)


class BodyLimit:
    """Refuses bodies of more than `max_body_bytes`, or of more than the limit of their path: at once by Content-Length,
    else as soon as they exceed it."""

    def __init__(self, app: ASGIApp, max_body_bytes: int, max_body_bytes_by_path: Mapping[str, int]) -> None:
        self.app = app
        self._max_body_bytes = max_body_bytes
        self._max_body_bytes_by_path = max_body_bytes_by_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        bound = self._max_body_bytes_by_path.get(scope["path"], self._max_body_bytes)
        announced = header_of(scope, b"content-length") or "0"
        if announced.isdigit() and int(announced) > bound:
            await error_response(_too_large(f"is {announced} bytes", bound))(scope, receive, send)
            return
        num_bytes = 0

        async def receive_bounded() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > bound:
                raise _too_large(f"has more than {bound} bytes", bound)
            return message

        await self.app(scope, receive_bounded, send)


def _too_large(size: str, bound: int) -> RequestTooLarge:
    return RequestTooLarge(f"the body {size}; send at most {bound} bytes")


#: An ASGI extension: its "close" closes the connection in the middle of an answer, so that the client sees a failure.
CUT = "celeriac.cut"

#: Another one: its "has" says whether the whole body of the request has arrived.
ARRIVED = "celeriac.arrived"
