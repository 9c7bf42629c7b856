"""Around every request, as plain ASGI: an id, figures, a bound on the body, and a plain 500 for what went wrong.

Plain ASGI because Starlette's BaseHTTPMiddleware puts a task and a queue between a stream and its client.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Mapping

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.errors import error_response
from api.ignored_fields import HEADER, header_value, ignored_fields_context
from domain.errors import CeleriacError, RequestTooLarge, ServerOverloaded
from observability import (
    http_request_seconds,
    http_requests_in_progress,
    http_requests_total,
    labelled,
    request_id_context,
    submitted_job_ids,
)

log = logging.getLogger(__name__)

CLIENT_CLOSED_REQUEST = 499  # for the figures only: nobody is there to read it


class RequestContext:
    """Names the request in its answer, in every log line and in every error; counts it; answers what nobody caught."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = f"req_{secrets.token_hex(12)}"
        token = request_id_context.set(request_id)
        submitted_job_ids.set([])
        ignored: list[str] = []
        ignored_token = ignored_fields_context.set(ignored)
        answer = _Answer(send, request_id, ignored)
        started = time.perf_counter()
        http_requests_in_progress.inc()
        try:
            await self.app(scope, receive, answer.send)
        except ClientDisconnect:
            answer.status = answer.status or CLIENT_CLOSED_REQUEST
        except asyncio.CancelledError:
            if answer.status is not None:
                raise
            await answer.send_whole(_stopping(), scope, receive)
        except Exception:  # an outermost loop: whatever it is, the client gets the one shape and no detail
            log.exception("request failed", extra={"method": scope["method"], "route": _route_of(scope)})
            if answer.status is None:  # else half an answer is out: the server cuts it, and the client sees that
                await answer.send_whole(_internal_error(), scope, receive)
        finally:
            http_requests_in_progress.dec()
            _count(scope, answer.status or CLIENT_CLOSED_REQUEST, time.perf_counter() - started)
            request_id_context.reset(token)
            ignored_fields_context.reset(ignored_token)


class _Answer:
    def __init__(self, send: Send, request_id: str, ignored: list[str]) -> None:
        """`ignored` is filled by whoever reads the request."""
        self._send = send
        self._header = (b"x-request-id", request_id.encode())
        self._ignored = ignored
        self.status: int | None = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), self._header, *self._ignored_header()]
        await self._send(message)

    def _ignored_header(self) -> list[tuple[bytes, bytes]]:
        return [(HEADER.encode(), header_value(self._ignored).encode())] if self._ignored else []

    async def send_whole(self, exc: CeleriacError, scope: Scope, receive: Receive) -> None:
        response = error_response(exc)
        if job_ids := submitted_job_ids.get():
            response.headers["x-job-id"] = job_ids[-1]
        await response(scope, receive, self.send)


def _internal_error() -> CeleriacError:
    return CeleriacError(f"the server failed; quote the request id when you report it{_what_of_the_job()}")


def _stopping() -> CeleriacError:
    """Of a request that is not answered when the time is over that a stopping server grants."""
    return ServerOverloaded(f"this server is stopping; retry in a moment{_what_of_the_job()}", retry_after_seconds=2)


def _what_of_the_job() -> str:
    job_ids = submitted_job_ids.get()
    return f"; {job_ids[-1]} may have been accepted: look at /v1/jobs/{job_ids[-1]} first" if job_ids else ""


def _route_of(scope: Scope) -> str:
    """The path template: a label must not hold ids."""
    return getattr(scope.get("route"), "path_format", "unmatched")


def _count(scope: Scope, status: int, seconds: float) -> None:
    route = _route_of(scope)
    labelled(http_requests_total, scope["method"], route, str(status)).inc()
    labelled(http_request_seconds, route).observe(seconds)


class BodyLimit:
    """Refuses bodies beyond `max_body_bytes`, or beyond what their path may have: by their announced length at once,
    else as soon as they pass it."""

    def __init__(self, app: ASGIApp, max_body_bytes: int, max_body_bytes_by_path: Mapping[str, int]) -> None:
        self.app = app
        self._max_body_bytes = max_body_bytes
        self._max_body_bytes_by_path = max_body_bytes_by_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        bound = self._max_body_bytes_by_path.get(scope["path"], self._max_body_bytes)
        announced = Headers(scope=scope).get("content-length", "0")
        if announced.isdigit() and int(announced) > bound:
            await error_response(_too_large(f"is {announced} bytes", bound))(scope, receive, send)
            return
        num_bytes = 0

        async def receive_bounded() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > bound:
                raise _too_large(f"goes beyond {bound} bytes", bound)
            return message

        await self.app(scope, receive_bounded, send)


def _too_large(size: str, bound: int) -> RequestTooLarge:
    return RequestTooLarge(f"the body {size}; at most {bound} are read, send less")
