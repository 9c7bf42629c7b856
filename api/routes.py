"""How requests find their routes: an application without FastAPI's layers around ours, and an index of paths.

FastAPI compares a request with the pattern of each route in turn, of which we have over a hundred, and wraps it in
layers that send, meter, limit and close what is sent, metered, limited and closed elsewhere here. That took longer than
our own layers (docs/adr/0065).
"""

from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.asyncexitstack import AsyncExitStackMiddleware
from fastapi.routing import APIRoute
from fastapi.telemetry import TelemetryConfig
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Receive, Scope, Send

Handler = Callable[[Request], Coroutine[Any, Any, Response]]

#: Our spans and metrics are our own (docs/adr/0059).
NO_TELEMETRY = TelemetryConfig(tracing=False, metrics=False, logs=False)


class Application(FastAPI):
    """FastAPI with no layers around those that are added but the one that answers exceptions. `RequestContext`, which
    is one of those, answers the exceptions that have no handler."""

    def __init__(self, **options: Any) -> None:
        super().__init__(telemetry=NO_TELEMETRY, **options)

    def build_middleware_stack(self) -> ASGIApp:
        # The routes that FastAPI's own function answers need its stack of files to close.
        routes = FixedRoutes(AsyncExitStackMiddleware(self.router), self.router.routes)
        app: ASGIApp = ExceptionMiddleware(routes, handlers=self.exception_handlers)
        for layer, args, kwargs in reversed(self.user_middleware):
            app = layer(app, *args, **kwargs)
        return app


class DirectRoute(APIRoute):
    """A route whose function takes the request and texts from its path, and makes the whole answer: it is called
    directly, as FastAPI's solving of dependencies would find nothing else. If it returns a view, FastAPI calls it."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        """Raises ValueError if the function asks for anything else."""
        super().__init__(path, endpoint, **options)
        asked = self.dependant
        if asked.dependencies or asked.query_params or asked.header_params or asked.cookie_params or asked.body_params:
            raise ValueError(f"{path}: its function may take the request and texts from the path; read the rest itself")
        self.is_direct = self.response_field is None
        if self.is_direct:
            self._handler = self.get_route_handler()
            self.app = self._answer

    def get_route_handler(self) -> Handler:
        if self.response_field is not None:
            return super().get_route_handler()
        names = [parameter.name for parameter in self.dependant.path_params]
        endpoint = self.endpoint

        async def call(request: Request) -> Response:
            response: Response = await endpoint(request=request, **{name: request.path_params[name] for name in names})
            return response

        return call

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = await self._handler(Request(scope, receive, send))
        await response(scope, receive, send)


class FixedRoutes:
    """Calls the direct routes whose paths have no parameters; all other requests go on to `app`."""

    def __init__(self, app: ASGIApp, routes: Iterable[BaseRoute]) -> None:
        self.app = app
        self._route_by_target = dict(_fixed(list(routes)))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = None
        if scope["type"] == "http":
            route = self._route_by_target.get((scope["method"], scope["path"]))
        if route is None:
            await self.app(scope, receive, send)
            return
        scope["route"], scope["endpoint"], scope["path_params"] = route, route.endpoint, {}
        await route.app(scope, receive, send)


def _fixed(routes: list[BaseRoute]) -> Iterable[tuple[tuple[str, str], DirectRoute]]:
    """The routes by method and path. As everywhere, the first one that matches answers."""
    for one in routes:
        if not isinstance(one, DirectRoute) or one.param_convertors:
            continue
        for method in one.methods or ():
            asked = {"type": "http", "method": method, "path": one.path}
            first = next(route for route in routes if route.matches(asked)[0] is Match.FULL)
            if isinstance(first, DirectRoute) and first.is_direct and not first.param_convertors:
                yield (method, one.path), first
