"""Servers for the remote back end: one whose answers a test decides, and a proxy that spoils what passes through it."""

import asyncio
import shutil
import socket
import tempfile
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Self

import httpx
import orjson
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from settings import ROOT
from tests.chaos.plant import Plant, start_prepared
from tests.waiting import wait_until


class HttpServer:
    """An ASGI app on a free port, in a thread."""

    def __init__(self, app: Any) -> None:
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self._socket.listen(128)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        config = uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, name="remote-server")

    def _run(self) -> None:
        asyncio.run(self._server.serve(sockets=[self._socket]))

    def __enter__(self) -> Self:
        self._thread.start()
        wait_until(lambda: self._server.started, "the server has started")
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()


Answer = Callable[[dict[str, Any]], Response]


class RemoteServer:
    """Answers completions as `answer` says, the planned `refusals` first. `bodies` are those of all requests so far."""

    def __init__(self) -> None:
        self.answer: Answer = lambda body: Response(status_code=500)
        self.refusals: deque[Response] = deque()
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.models_status = 200
        self.models = ["theirs"]
        self.metrics = ""
        self.num_closed = 0  # streams that the client closed before their end
        app = Starlette(
            routes=[
                Route("/v1/completions", self._complete, methods=["POST"]),
                Route("/v1/chat/completions", self._complete, methods=["POST"]),
                Route("/v1/models", self._list),
                Route("/metrics", lambda request: Response(self.metrics)),
            ]
        )
        self.http = HttpServer(app)

    @property
    def url(self) -> str:
        return f"{self.http.url}/v1"

    async def _complete(self, request: Request) -> Response:
        self.bodies.append(orjson.loads(await request.body()))
        self.keys.append(request.headers.get("authorization"))
        return self.refusals.popleft() if self.refusals else self.answer(self.bodies[-1])

    async def _list(self, request: Request) -> Response:
        return JSONResponse({"data": [{"id": name} for name in self.models]}, self.models_status)

    def stream(self, *events: object, is_cut: bool = False, is_endless: bool = False) -> Response:
        """Server-sent events. Cut, the connection ends without warning; endless, it stays open after the last one."""

        async def frames() -> AsyncIterator[bytes]:
            try:
                for event in events:
                    yield b"data: " + orjson.dumps(event) + b"\n\n"
                    await asyncio.sleep(0)
                if is_endless:
                    await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.num_closed += 1
                raise
            if is_cut:
                raise ConnectionError("as planned")
            yield b"data: [DONE]\n\n"

        return StreamingResponse(frames(), media_type="text/event-stream")


def choice(**fields: object) -> dict[str, object]:
    """A chunk with one choice."""
    return {"choices": [{"index": 0, "text": "", "logprobs": None, "finish_reason": None} | fields]}


@contextmanager
def remote_server() -> Iterator[RemoteServer]:
    server = RemoteServer()
    with server.http:
        yield server


@contextmanager
def second_celeriac() -> Iterator[str]:
    """The URL of an API and a worker of celeriac-mini, which another Celeriac may use as its remote server."""
    folder = Path(tempfile.mkdtemp(prefix="celeriac-remote-"))
    shutil.copytree(ROOT / "models" / "celeriac-mini", folder / "celeriac-mini")
    models = '[[models]]\nid = "celeriac-mini"\npath = "celeriac-mini"\ndevice = "cpu"\n'
    settings = {"flush_min_seconds": 0.02, "flush_max_seconds": 0.1}
    plant = Plant(
        folder, models=models, worker_models={"there": "celeriac-mini"}, settings=settings, start=start_prepared
    )
    try:
        with plant:
            plant.start_servers()
            plant.start_parts()
            plant.wait_until_ready()
            yield f"{plant.api_urls[0]}/v1"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class FaultyProxy:
    """Passes requests on to `target()`, except as planned. `refusals` are answered to the next POSTs instead; each
    number in `cuts` is how many events the next stream passes on before its connection ends without warning; streams
    pause after `hold_after` events while that is set."""

    def __init__(self, target: Callable[[], str]) -> None:
        self._target = target
        self.refusals: deque[int] = deque()  # their statuses
        self.cuts: deque[int] = deque()
        self.hold_after: int | None = None
        self.is_away = False  # whether it answers 502 to everything and cuts every stream
        self.num_posts = self.num_streams = 0  # in all, and open at the moment
        routes = [Route("/{path:path}", self._pass_on, methods=["GET", "POST"])]
        self.http = HttpServer(Starlette(routes=routes, lifespan=self._with_client))

    @asynccontextmanager
    async def _with_client(self, _: Starlette) -> AsyncIterator[None]:
        """One for all requests, which may be abandoned at any moment: with it, all connections are closed."""
        limits = httpx.Limits(max_keepalive_connections=0)  # an idle one may be to an API that was killed
        async with httpx.AsyncClient(timeout=300, limits=limits) as self._client:
            yield

    async def _pass_on(self, request: Request) -> Response:
        is_post = request.method == "POST"
        self.num_posts += is_post
        if self.is_away or (is_post and self.refusals):
            return Response(status_code=502 if self.is_away else self.refusals.popleft())
        headers = {name: request.headers[name] for name in ("authorization", "content-type") if name in request.headers}
        try:
            url = self._target() + request.url.path
            asked = self._client.build_request(request.method, url, content=await request.body(), headers=headers)
            answer = await self._client.send(asked, stream=True)
        except (httpx.HTTPError, LookupError):
            return Response(status_code=502)
        cut_after = self.cuts.popleft() if self.cuts and is_post else None
        kept = {name: answer.headers[name] for name in ("content-type", "retry-after") if name in answer.headers}
        return StreamingResponse(self._pieces(answer, cut_after), answer.status_code, headers=kept)

    def _is_held(self, num_passed: int) -> bool:
        return self.hold_after is not None and num_passed > self.hold_after and not self.is_away

    async def _pieces(self, answer: httpx.Response, cut_after: int | None) -> AsyncIterator[bytes]:
        num_passed = 0
        self.num_streams += 1
        try:
            async for piece in answer.aiter_raw():
                num_passed += piece.count(b"data:")
                while self._is_held(num_passed):  # noqa: ASYNC110  (another thread ends it)
                    await asyncio.sleep(0.01)
                if self.is_away or (cut_after is not None and num_passed > cut_after):
                    raise ConnectionError("as planned")
                yield piece
        finally:
            self.num_streams -= 1
            await answer.aclose()
