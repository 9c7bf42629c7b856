"""Which methods a path answers to, known in one place: for 405's `Allow`, for OPTIONS, and for HEAD wherever GET is."""

from collections.abc import Iterable, Iterator, Sequence

from starlette.routing import BaseRoute, Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

ROUTED_METHODS = ("DELETE", "GET", "PATCH", "POST", "PUT")  # those that routes here are declared for
WHOLE_SERVER = "*"  # OPTIONS may ask of no path in particular (RFC 9112, 3.2.4)


def methods_of(routes: Sequence[BaseRoute], scope: Scope) -> list[str]:
    """In order; empty where there is no such path."""
    if scope["path"] == WHOLE_SERVER:
        return sorted({*ROUTED_METHODS, "HEAD", "OPTIONS"})
    methods = _routed_methods(routes, scope)
    if not methods:
        return []
    implied = {"HEAD", "OPTIONS"} if "GET" in methods else {"OPTIONS"}
    return sorted(methods | implied)


def _routed_methods(routes: Sequence[BaseRoute], scope: Scope) -> set[str]:
    """Starlette names the methods of one route alone, and others may share its path. A path that is a route's own is no
    id of another's."""
    own = {method for route in _flat(routes) if route.path == scope["path"] for method in route.methods or ()}
    if own:
        return own
    tried = [(method, {**scope, "method": method}) for method in ROUTED_METHODS]
    return {method for method, tried_scope in tried if any(_is_match(route, tried_scope) for route in routes)}


def _is_match(route: BaseRoute, scope: Scope) -> bool:
    return route.matches(scope)[0] is Match.FULL


def _flat(routes: Iterable[BaseRoute]) -> Iterator[Route]:
    """With those of included routers."""
    for route in routes:
        if isinstance(route, Route):
            yield route
        elif (included := getattr(route, "original_router", None)) is not None:
            yield from _flat(included.routes)


def build_routes(routes: Sequence[BaseRoute]) -> None:
    """FastAPI makes an included route of its declaration when it is first looked at: for all of them together that is
    long enough for an event loop to be missed, so it is done before anybody is there."""
    methods_of(routes, {"type": "http", "path": "/none of them", "root_path": "", "headers": []})


class ImpliedMethods:
    """Answers HEAD as GET without its body (RFC 9110, 9.3.2), and OPTIONS with `Allow` (9.3.7), for every route."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in ("HEAD", "OPTIONS"):
            await self.app(scope, receive, send)
            return
        methods = methods_of(scope["app"].router.routes, scope)
        if scope["method"] == "HEAD" and "HEAD" in methods:
            await self._answer_head(scope, receive, send)
        elif scope["method"] == "OPTIONS" and methods:
            await _answer_options(methods, send)
        else:
            await self.app(scope, receive, send)

    async def _answer_head(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A stream sees its reader leave once the headers are out: `receive` says so of an answer that is complete."""

        async def send_head(message: Message) -> None:
            if message["type"] == "http.response.start":
                await send(message)
                await send({"type": "http.response.body", "body": b"", "more_body": False})

        as_get = {**scope, "method": "GET"}
        try:
            await self.app(as_get, receive, send_head)
        finally:
            if "route" in as_get:
                scope["route"] = as_get["route"]  # for the figures


async def _answer_options(methods: Sequence[str], send: Send) -> None:
    headers = [(b"allow", ", ".join(methods).encode())]
    await send({"type": "http.response.start", "status": 204, "headers": headers})
    await send({"type": "http.response.body", "body": b"", "more_body": False})
