"""The process around the application: its socket, its event loop, and how it ends."""

import gc
import logging
import socket
from collections.abc import Sequence

import uvicorn
from fastapi import FastAPI

from api.app import create_app
from api.protocol import BoundedHttp
from observability import configure_logging
from settings import Settings

log = logging.getLogger(__name__)

GRACE_SECONDS = 10  # what open requests get at SIGTERM; streams end at once and are resumed elsewhere
KEEP_ALIVE_SECONDS = 75  # longer than the clients' pools keep idle connections, so that they never lose a race
GARBAGE_THRESHOLDS = (50_000, 20, 50)  # the interpreter's own collect a hundred times as often: a quarter of all CPU
UNREAD_SECONDS = 30  # a peer that takes nothing for so long is dropped by the kernel


def serve(settings: Settings) -> None:
    """Serve until SIGINT or SIGTERM."""
    configure_logging(settings.log_level, settings.log_format)
    app = create_app(settings)
    with open_socket(settings.host, settings.port) as listening:
        host, port = listening.getsockname()[:2]
        log.info("listening on http://%s:%s", f"[{host}]" if ":" in host else host, port)
        collect_garbage_seldom()
        make_server(app).run(sockets=[listening])


def collect_garbage_seldom() -> None:
    """Requests leave few cycles behind, and what is imported by now stays: no collection needs to walk it."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GARBAGE_THRESHOLDS)


def open_socket(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.create_server((host, port), family=family, backlog=2048)
    # Inherited by every connection: ends those whose client neither reads nor closes, which would hold memory for ever.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD_SECONDS * 1000)
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def make_server(app: FastAPI) -> "GracefulServer":
    config = uvicorn.Config(
        app,
        loop="uvloop",
        http=BoundedHttp,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # nothing here asks who the client is
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    return GracefulServer(config, app)


class GracefulServer(uvicorn.Server):
    """uvicorn's server that first tells the application it is going to stop: otherwise it waits for streams in vain."""

    def __init__(self, config: uvicorn.Config, app: FastAPI) -> None:
        super().__init__(config)
        self._app = app

    async def shutdown(self, sockets: Sequence[socket.socket] | None = None) -> None:
        if (services := getattr(self._app.state, "services", None)) is not None:
            services.draining.set()
        await super().shutdown(list(sockets) if sockets is not None else None)
