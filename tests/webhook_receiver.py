"""A webhook receiver on a port of its own, whose answers the test decides, and a sender."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from maintenance.callbacks import CallbackPublisher
from maintenance.webhooks import WebhookSender
from settings import Settings
from storage.database import async_session_factory, open_async_database
from tasks.webhook_http import TargetGuard


@dataclass(frozen=True, slots=True)
class Received:
    path: str
    headers: dict[str, str]
    body: bytes


def accept_all(received: Received) -> int:
    return 200


@dataclass
class Receiver:
    """`answer` gives the status of each request. While it blocks, the sender waits."""

    answer: Callable[[Received], int] = accept_all
    answer_headers: dict[str, str] = field(default_factory=dict)
    answer_body: bytes = b""
    received: list[Received] = field(default_factory=list)
    num_connections: int = 0
    port: int = 0

    def url(self, path: str = "/hook", host: str = "localhost") -> str:
        return f"http://{host}:{self.port}{path}"


@contextmanager
def receiving() -> Iterator[Receiver]:
    receiver = Receiver()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            receiver.num_connections += 1
            super().setup()

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            headers = {name.lower(): value for name, value in self.headers.items()}
            received = Received(self.path, headers, body)
            receiver.received.append(received)
            status = receiver.answer(received)
            try:
                self.send_response(status)
                for name, value in receiver.answer_headers.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(receiver.answer_body)))
                self.end_headers()
                self.wfile.write(receiver.answer_body)
            except OSError:
                self.close_connection = True  # the sender closed the connection

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.block_on_close = False
    receiver.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield receiver
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class SenderThread:
    """A sender with an event loop and database connections of its own."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._loop = asyncio.new_event_loop()
        self._sender: WebhookSender | None = None
        self._is_open = threading.Event()
        self._thread = threading.Thread(target=self._run, name="webhooks", daemon=True)

    def start(self) -> None:
        self._thread.start()
        self._is_open.wait()

    def stop(self) -> None:
        """Returns when the deliveries under way are recorded."""
        if self._sender is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._sender.stop)
        self._thread.join()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._send())

    async def _send(self) -> None:
        database = open_async_database(self._settings.database_url, pool_size=1, max_overflow=1)
        self._sender = WebhookSender(
            async_session_factory(database), TargetGuard(self._settings), CallbackPublisher(self._settings)
        )
        self._is_open.set()
        try:
            await self._sender.run()
        finally:
            await database.dispose()


@contextmanager
def sending(settings: Settings) -> Iterator[SenderThread]:
    thread = SenderThread(settings)
    thread.start()
    try:
        yield thread
    finally:
        thread.stop()
