"""The API server process: its event loop, garbage collection and graceful shutdown."""

import asyncio
import gc
import logging
import math
import socket
from collections.abc import Sequence
from functools import partial

import uvicorn
from fastapi import FastAPI

from api.app import create_app
from api.connections import BoundedHttp, acceptors, open_socket
from api.processes import ApiProcesses, Ports
from local.descriptors import RESERVED, raise_limit
from observability import configure_logging
from settings import Settings
from tasks import tracing

log = logging.getLogger(__name__)

PING_SECONDS = 20.0  # between two pings on a WebSocket, and how long a client may take to answer one

GRACE_SECONDS = 10  # how long open requests get to finish on SIGTERM, once all streams have been told to end

KEEP_ALIVE_SECONDS = 75  # longer than clients keep idle connections, so that none is closed under a new request

GARBAGE_THRESHOLDS = (50_000, 20, 50)  # CPython's own collect a hundred times as often: a quarter of all CPU time


def serve(settings: Settings) -> int:
    """Serve until SIGINT or SIGTERM. Returns the exit code."""
    configure_logging(settings.log_level, settings.log_format)
    if settings.api_processes > 1:
        return ApiProcesses(settings.host, settings.port, settings.api_processes, partial(_serve_on, settings)).run()
    with open_socket(settings.host, settings.port) as listening:
        _serve_on(settings, [listening], None)
    return 0


def _serve_on(settings: Settings, sockets: Sequence[socket.socket], ports: Ports | None) -> None:
    """`ports` are those of all processes of a group, if there are several."""
    tracing.provider()  # now, as its imports would delay the first requests
    app = create_app(with_streams_for(settings, raise_limit()))
    app.state.ports = ports
    host, port = sockets[0].getsockname()[:2]
    log.info("listening on http://%s:%s", f"[{host}]" if ":" in host else host, port)
    collect_garbage_rarely()
    make_server(app).run(sockets=[*acceptors(sockets[0]), *sockets[1:]])


def with_streams_for(settings: Settings, max_descriptors: int) -> Settings:
    """With fewer streams, if this process may not open as many connections: who is refused knows what to do, and who is
    not accepted does not."""
    room = max(1, max_descriptors - RESERVED)
    if room >= settings.max_streams:
        return settings
    log.warning(
        "CELERIAC_MAX_STREAMS is %d, but this process may open only %d files and connections, so it allows %d streams; "
        "raise the limit (ulimit -n, LimitNOFILE of systemd)",
        settings.max_streams,
        max_descriptors,
        room,
    )
    return settings.model_copy(update={"max_streams": room})


def collect_garbage_rarely() -> None:
    """Requests leave few reference cycles behind, and what is imported by now stays, so collections may skip it."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GARBAGE_THRESHOLDS)


def make_server(app: FastAPI) -> "GracefulServer":
    config = uvicorn.Config(
        app,
        loop="uvloop",
        http=BoundedHttp,
        ws="none",  # see BoundedHttp
        ws_max_size=app.state.max_message_bytes,
        ws_ping_interval=PING_SECONDS,
        ws_ping_timeout=PING_SECONDS,
        ws_per_message_deflate=False,  # else a few bytes could become as many as a message may have
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # client addresses are not used
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=math.ceil(app.state.drain_seconds) + GRACE_SECONDS,
    )
    return GracefulServer(config, app)


class GracefulServer(uvicorn.Server):
    """Tells the application to end its streams before uvicorn shuts down and waits for them: at once those that their
    readers resume elsewhere, and the others after a while, in which most come to their end."""

    def __init__(self, config: uvicorn.Config, app: FastAPI) -> None:
        super().__init__(config)
        self._app = app

    async def shutdown(self, sockets: Sequence[socket.socket] | None = None) -> None:
        if (services := getattr(self._app.state, "services", None)) is not None:
            services.draining.set()
            asyncio.get_running_loop().call_later(self._app.state.drain_seconds, services.last_call.set)
        await super().shutdown(list(sockets) if sockets is not None else None)
