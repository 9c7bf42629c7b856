"""Servers that do nothing, behind the same uvicorn settings as the API: the ceilings of bench.accept.

`/bare` is answered by a bare ASGI application, `/fastapi` by FastAPI alone with nothing of ours, and `/v1/jobs` by our
layers around a route that only reads its body.
"""

import logging

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from api.app import create_app
from api.connections import open_socket
from api.server import collect_garbage_rarely, make_server
from api.services import private_router
from domain.catalog import Catalog, ModelSpec
from observability import configure_logging
from settings import get_settings

BODY = b'{"id":"job_01JABCDEFGHJKMNPQRSTVWXYZ0","object":"job","status":"queued"}' + b" " * 600


async def answer_barely(scope: Scope, receive: Receive, send: Send) -> None:
    while (await receive()).get("more_body"):
        pass
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(BODY)).encode())]
    await send({"type": "http.response.start", "status": 202, "headers": headers})
    await send({"type": "http.response.body", "body": BODY})


def fastapi_alone() -> FastAPI:
    """One route and no layers but FastAPI's own."""
    app = FastAPI()

    @app.post("/fastapi")
    async def answer_nothing(request: Request) -> Response:
        await request.body()
        return Response(BODY, 202, media_type="application/json")

    return app


class Ceilings:
    """Wraps the application, and answers /bare and /fastapi without it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._alone = fastapi_alone()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path")
        if path == "/bare":
            await answer_barely(scope, receive, send)
        elif path == "/fastapi":
            await self._alone(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def main() -> None:
    configure_logging("INFO", "text")
    router = private_router("Jobs")

    @router.post("/v1/jobs")
    async def answer_nothing(request: Request) -> Response:
        await request.body()
        return Response(BODY, 202, media_type="application/json")

    spec = ModelSpec(id="fake", path="fake", backend="fake", max_model_len=64)
    app = create_app(get_settings(), Catalog([spec]))
    app.router.routes.clear()
    app.router.routes.extend(router.routes)
    app.add_middleware(Ceilings)
    collect_garbage_rarely()
    with open_socket("127.0.0.1", 0) as listening:
        logging.getLogger("bench").info("listening on http://127.0.0.1:%s", listening.getsockname()[1])
        make_server(app).run(sockets=[listening])


if __name__ == "__main__":
    main()
