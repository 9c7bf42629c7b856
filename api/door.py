"""What stands before every route: the door where there are no keys, and CORS for the pages that may come in."""

from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from api.errors import error_response
from domain.door import Door
from domain.errors import InvalidRequest, PermissionDenied

MAX_AGE_SECONDS = 600
#: What the answers' scripts may read beside the body: ids, and what steers a client's retries.
EXPOSED_HEADERS = (
    "x-job-id",
    "x-job-ids",
    "x-request-id",
    "x-ignored-fields",
    "x-retry-attached",
    "x-should-retry",
    "retry-after",
    "idempotent-replayed",
    "location",
    "openai-processing-ms",
    "openai-version",
    "x-ratelimit-limit-requests",
    "x-ratelimit-remaining-requests",
    "x-ratelimit-reset-requests",
)


class DoorWithoutKeys:
    """Refuses foreign hosts and foreign pages with 403, whatever they ask for. Only where no key is asked for: a page
    cannot send a key that it does not know."""

    def __init__(self, app: ASGIApp, door: Door) -> None:
        self.app = app
        self._door = door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (refusal := self._refusal(scope)) is not None:
            await refusal(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        if len(hosts) != 1 and (hosts or scope["http_version"] != "1.0"):  # RFC 9112, section 3.2
            return error_response(InvalidRequest(f"there are {len(hosts)} Host headers; send exactly one"))
        if len(headers.getlist("origin")) > 1:
            return error_response(InvalidRequest("there are several Origin headers; send at most one"))
        reason = self._door.refusal(scope["method"], headers)
        return None if reason is None else error_response(PermissionDenied(reason))


class Cors(CORSMiddleware):
    """Starlette's, for the origins of the settings; a preflight that it refuses is answered in our error shape."""

    def __init__(self, app: ASGIApp, origins: Collection[str]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=("DELETE", "GET", "HEAD", "OPTIONS", "POST"),
            allow_headers=("*",),  # those that are asked for: SDKs send ever new ones
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
                f"a page of {request_headers['origin'][:80]!r} may not send {method} here; "
                "its origin must be in CELERIAC_CORS_ORIGINS"
            )
        )
        refusal.headers["vary"] = answer.headers["vary"]
        return refusal
