"""The webhook HTTP client: never connects to our own network (SSRF), and is bounded in time and bytes.

A name is resolved once, every address in the answer must be public, and the connection goes to one of exactly these
addresses, so a name whose answer changes in between (DNS rebinding) gains nothing. Proxies are not used and redirects
are not followed.

httpcore's own pool checks all of its connections several times per request, with a system call each; with many
receivers that costs far more than the request. Here a request checks only the oldest connection and those of its own
origin.
"""

import asyncio
import socket
import ssl
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass
from threading import Lock, Thread

import httpcore

from domain.webhooks import BadWebhookUrl, WebhookUrl, is_in, is_local_name, is_public_address, parse_webhook_url
from settings import Settings

CONNECT_SECONDS = 3.0

MAX_ADDRESSES_TRIED = 2

MAX_LOOKUPS = 256  # at a time per process, including abandoned ones

SocketOptions = Iterable[httpcore.SOCKET_OPTION]

Resolve = Callable[[str, int], Awaitable[list[str]]]


class TargetRefused(Exception):
    """The name resolves to an address that webhooks may not reach. The message does not have the address, which may be
    internal."""


class TargetInClear(TargetRefused):
    """The address is public, where nothing may be sent in clear text."""


class TargetUnknown(Exception):
    """The name has no address."""


def look_up(host: str, port: int) -> list[str]:
    """All addresses of a name. Blocks for as long as the system's resolver does. Raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    return list(dict.fromkeys(str(address[4][0]) for address in found))


class LookupThreads:
    """A thread for each name that is being looked up. A thread whose name server does not answer is blocked for half a
    minute, and an event loop has only a few threads (uvloop four), which also look up the database's address."""

    def __init__(self, look_up: Callable[[str, int], list[str]] = look_up, *, max_lookups: int = MAX_LOOKUPS) -> None:
        self._look_up = look_up
        self._max_lookups = max_lookups
        self._lock = Lock()
        self._lookups: dict[tuple[str, int], Future[list[str]]] = {}

    async def resolve(self, host: str, port: int) -> list[str]:
        """All addresses of a name. Raises OSError."""
        return await asyncio.wrap_future(self._begin(host, port))

    def _begin(self, host: str, port: int) -> "Future[list[str]]":
        """Resolve a name; concurrent callers for the same name share one lookup."""
        with self._lock:
            lookup = self._lookups.get((host, port))
            if lookup is not None:
                return lookup
            if len(self._lookups) >= self._max_lookups:
                raise OSError(f"{self._max_lookups} names are already being looked up")
            lookup = self._lookups[host, port] = Future()
            lookup.set_running_or_notify_cancel()  # a caller that gives up must not cancel the lookup for the others
            Thread(target=self._run, args=(host, port, lookup), name="webhook-lookup", daemon=True).start()
            return lookup

    def _run(self, host: str, port: int, lookup: "Future[list[str]]") -> None:
        addresses: list[str] = []
        error: Exception | None = None
        try:
            addresses = self._look_up(host, port)
        except Exception as exc:  # raised in the callers
            error = exc
        with self._lock:
            del self._lookups[host, port]
        if error is None:
            lookup.set_result(addresses)
        else:
            lookup.set_exception(error)


LOOKUPS = LookupThreads()


class TargetGuard:
    """Checks whether the settings allow a target. `webhook_private_networks` also allow addresses in them, and http to
    these; `webhook_private_targets` allows http, any port and any address."""

    def __init__(self, settings: Settings, resolve: Resolve = LOOKUPS.resolve) -> None:
        self._allows_private = settings.webhook_private_targets
        self._networks = settings.webhook_networks
        self._ports = frozenset(int(port) for port in settings.webhook_ports.split(","))
        self._resolve = resolve

    def parse(self, text: str) -> WebhookUrl:
        """Parse and check a URL without resolving its host. Raises BadWebhookUrl."""
        url = parse_webhook_url(text)
        if self._allows_private:
            return url
        if url.scheme != "https" and not self._networks:
            raise BadWebhookUrl("it begins with http://; use one that begins with https://")
        if url.port not in self._ports:
            raise BadWebhookUrl(
                f"the port is {url.port}; the allowed ports are: {', '.join(map(str, sorted(self._ports)))}"
            )
        if is_local_name(url.host) and not self._networks:
            raise BadWebhookUrl("the host is a private name; use a public one")
        return url

    async def check(self, text: str) -> WebhookUrl:
        """Like `parse`, and also resolves the host. If the resolver does not answer, the URL passes, as every delivery
        checks again. Raises BadWebhookUrl."""
        url = self.parse(text)
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await self.addresses(url.scheme, url.host, url.port)
        except TargetInClear:
            raise BadWebhookUrl(
                "it begins with http://, and the host is not in a network of the operator's; use https"
            ) from None
        except TargetRefused:
            raise BadWebhookUrl("the address of the host is not public; use a public host") from None
        except TargetUnknown:
            raise BadWebhookUrl("the host has no address; check the name") from None
        except (OSError, TimeoutError):
            pass
        return url

    async def addresses(self, scheme: str, host: str, port: int) -> list[str]:
        """The addresses of a host, all of them allowed. Raises TargetRefused if any is not (TargetInClear if it would
        be with https), TargetUnknown or OSError."""
        try:
            found = await self._resolve(host, port)
        except socket.gaierror as exc:
            if exc.errno in (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)):
                raise TargetUnknown(host) from None
            raise
        except UnicodeError:
            raise TargetUnknown(host) from None
        if not found:
            raise TargetUnknown(host)
        if self._allows_private:
            return found
        if not all(is_public_address(one) or self._is_in_networks(one) for one in found):
            raise TargetRefused(host)
        if scheme != "https" and not all(map(self._is_in_networks, found)):
            raise TargetInClear(host)
        return found

    def _is_in_networks(self, address: str) -> bool:
        return bool(self._networks) and is_in(address, self._networks)


class GuardedNetwork(httpcore.AsyncNetworkBackend):
    """Makes httpcore's connections for URLs of one scheme: the socket gets a checked address; the Host header and TLS
    keep the name."""

    def __init__(self, guard: TargetGuard, scheme: str, network: httpcore.AsyncNetworkBackend | None = None) -> None:
        self._guard = guard
        self._scheme = scheme
        self._network = network or httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: SocketOptions | None = None,
    ) -> httpcore.AsyncNetworkStream:
        async with asyncio.timeout(CONNECT_SECONDS):
            addresses = await self._guard.addresses(self._scheme, host, port)
            return await self._connect(addresses[:MAX_ADDRESSES_TRIED], port, socket_options)

    async def _connect(
        self, addresses: list[str], port: int, socket_options: SocketOptions | None
    ) -> httpcore.AsyncNetworkStream:
        *others, last = addresses
        for address in others:
            try:
                return await self._connect_one(address, port, socket_options)
            except httpcore.ConnectError:
                continue
        return await self._connect_one(last, port, socket_options)

    async def _connect_one(
        self, address: str, port: int, socket_options: SocketOptions | None
    ) -> httpcore.AsyncNetworkStream:
        stream = await self._network.connect_tcp(address, port, CONNECT_SECONDS, None, socket_options)
        peer = stream.get_extra_info("server_addr")
        if peer is None or str(peer[0]) != address:
            await stream.aclose()
            raise TargetRefused(f"connected to an address other than {address}")
        return stream

    async def connect_unix_socket(
        self, path: str, timeout: float | None = None, socket_options: SocketOptions | None = None
    ) -> httpcore.AsyncNetworkStream:
        raise TargetRefused("webhooks do not use Unix sockets")

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


KEEPALIVE_SECONDS = 10.0

Origin = tuple[str, str, int]  # scheme, host, port


class Connections:
    """A connection pool. Bound to one event loop. At most `max_open` connections are open, in use or idle: a new one
    replaces the one that has been idle longest, or waits while all are in use. `network_of(scheme)` connects them."""

    def __init__(self, network_of: Callable[[str], httpcore.AsyncNetworkBackend], max_open: int) -> None:
        self._network_of = network_of
        self._ssl_context = ssl.create_default_context()
        self._max_open = max_open
        self._room = asyncio.Semaphore(max_open)
        self._num_in_use = 0
        self._idle: dict[httpcore.AsyncHTTPConnection, Origin] = {}  # the longest idle first
        self._idle_by_origin: defaultdict[Origin, list[httpcore.AsyncHTTPConnection]] = defaultdict(list)
        self._dropped: list[httpcore.AsyncHTTPConnection] = []  # to be closed

    @asynccontextmanager
    async def use(self, url: WebhookUrl) -> AsyncIterator[httpcore.AsyncHTTPConnection]:
        """A connection for one request; a new one connects with that request. It is kept if the whole answer was
        read."""
        origin = (url.scheme, url.host, url.port)
        async with self._room:
            connection = self._take(origin)
            try:
                await self._close_dropped()
                yield connection
            finally:
                await self._give_back(connection, origin)

    async def aclose(self) -> None:
        """Call only when no connection is in use."""
        self._dropped += self._idle
        self._idle.clear()
        self._idle_by_origin.clear()
        await self._close_dropped()

    def _take(self, origin: Origin) -> httpcore.AsyncHTTPConnection:
        while self._idle and self._oldest().has_expired():
            self._drop(self._oldest())
        connection = self._take_idle(origin) or self._new(origin)
        self._num_in_use += 1
        while self._num_in_use + len(self._idle) > self._max_open:
            self._drop(self._oldest())
        return connection

    def _take_idle(self, origin: Origin) -> httpcore.AsyncHTTPConnection | None:
        """The most recently used one, so that connections that an origin does not need expire."""
        while origin in self._idle_by_origin:
            connection = self._idle_by_origin[origin][-1]
            if not connection.has_expired():
                self._forget(connection)
                return connection
            self._drop(connection)
        return None

    def _new(self, origin: Origin) -> httpcore.AsyncHTTPConnection:
        scheme, host, port = origin
        return httpcore.AsyncHTTPConnection(
            httpcore.Origin(scheme.encode(), host.encode(), port),
            ssl_context=self._ssl_context,
            keepalive_expiry=KEEPALIVE_SECONDS,
            network_backend=self._network_of(scheme),
        )

    async def _give_back(self, connection: httpcore.AsyncHTTPConnection, origin: Origin) -> None:
        self._num_in_use -= 1
        if not connection.is_available():
            await connection.aclose()
            return
        self._idle[connection] = origin
        self._idle_by_origin[origin].append(connection)

    def _oldest(self) -> httpcore.AsyncHTTPConnection:
        return next(iter(self._idle))

    def _drop(self, connection: httpcore.AsyncHTTPConnection) -> None:
        self._forget(connection)
        self._dropped.append(connection)

    def _forget(self, connection: httpcore.AsyncHTTPConnection) -> None:
        origin = self._idle.pop(connection)
        self._idle_by_origin[origin].remove(connection)
        if not self._idle_by_origin[origin]:
            del self._idle_by_origin[origin]

    async def _close_dropped(self) -> None:
        while self._dropped:
            await self._dropped.pop().aclose()


TOTAL_SECONDS = 10.0  # for a whole attempt

MAX_ANSWER_BYTES = 4_096  # more is not read

MAX_CONNECTIONS = 256

USER_AGENT = "Celeriac-Webhooks/1"


@dataclass(frozen=True, slots=True)
class WebhookResponse:
    """The result of an attempt: the receiver's status code, or why there is none."""

    status_code: int | None
    error: str | None
    seconds: float

    @property
    def is_success(self) -> bool:
        return self.status_code is not None and 200 <= self.status_code < 300

    @property
    def is_gone(self) -> bool:
        return self.status_code == 410


class WebhookClient:
    """Posts webhooks. Bound to one event loop. Keeps connections open for a few seconds, each to an address that was
    checked when it was opened."""

    def __init__(self, guard: TargetGuard, network: httpcore.AsyncNetworkBackend | None = None) -> None:
        self._connections = Connections(lambda scheme: GuardedNetwork(guard, scheme, network), MAX_CONNECTIONS)

    async def aclose(self) -> None:
        await self._connections.aclose()

    async def post(self, url: WebhookUrl, headers: dict[str, str], body: bytes) -> WebhookResponse:
        """Never raises for errors of the receiver or the network. The body of the answer is discarded."""
        began_at = time.monotonic()
        status_code, error = None, None
        try:
            async with asyncio.timeout(TOTAL_SECONDS):
                status_code = await self._post(url, headers, body)
        except (TimeoutError, httpcore.TimeoutException):
            error = "timeout"
        except TargetInClear:
            error = "http:// reaches only hosts in a network of the operator's; use https"
        except TargetRefused:
            error = "the host has an address that is not public"
        except TargetUnknown:
            error = "the host has no address"
        except httpcore.ConnectError as exc:
            error = "TLS handshake failed" if isinstance(exc.__context__, ssl.SSLError) else "connection refused"
        except (httpcore.NetworkError, OSError):
            error = "connection failed"
        except (httpcore.ProtocolError, httpcore.UnsupportedProtocol, ValueError):
            error = "the answer is not HTTP"
        if status_code is not None and not 200 <= status_code < 300:
            error = f"the receiver answered {status_code}"
        return WebhookResponse(status_code, error, time.monotonic() - began_at)

    async def _post(self, url: WebhookUrl, headers: dict[str, str], body: bytes) -> int:
        timeouts = {"connect": CONNECT_SECONDS, "read": TOTAL_SECONDS, "write": TOTAL_SECONDS}
        target = httpcore.URL(scheme=url.scheme, host=url.host, port=url.port, target=url.target)
        authority = url.host if str(url).split("/")[2] == url.host else f"{url.host}:{url.port}"
        all_headers = {
            "host": authority,
            "content-type": "application/json",
            "content-length": str(len(body)),
            "user-agent": USER_AGENT,
        } | headers
        async with (
            self._connections.use(url) as connection,
            connection.stream(
                "POST", target, headers=list(all_headers.items()), content=body, extensions={"timeout": timeouts}
            ) as response,
        ):
            num_bytes = 0
            async for part in response.aiter_stream():
                num_bytes += len(part)
                if num_bytes > MAX_ANSWER_BYTES:
                    break
            return int(response.status)
