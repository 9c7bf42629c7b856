"""The guard against webhooks into our own network (SSRF): which URLs are allowed, and a connection that goes only where
the guard looked.

A name is resolved once, every address of the answer must be public, and the connection is made to one of these very
addresses, so a name that changes its answer in between (DNS rebinding) gains nothing. Proxies and redirects are unknown
here.
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterable

import httpcore

from domain.webhook_urls import (
    BadWebhookUrl,
    WebhookUrl,
    is_local_name,
    is_public_address,
    parse_webhook_url,
)
from settings import Settings

CONNECT_SECONDS = 3.0
MAX_ADDRESSES_TRIED = 2

SocketOptions = Iterable[httpcore.SOCKET_OPTION]
Resolve = Callable[[str, int], Awaitable[list[str]]]


class TargetRefused(Exception):
    """The name leads to an address that no webhook may reach. Says nothing of the address: it may be ours."""


class TargetUnknown(Exception):
    """The name has no address."""


async def resolve(host: str, port: int) -> list[str]:
    """All addresses of a name. Raises OSError."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    return list(dict.fromkeys(str(address[4][0]) for address in found))


class TargetGuard:
    """What the settings allow. With `webhook_private_targets`: http, any port and any address, too."""

    def __init__(self, settings: Settings, resolve: Resolve = resolve) -> None:
        self._allows_private = settings.webhook_private_targets
        self._ports = frozenset(int(port) for port in settings.webhook_ports.split(","))
        self._resolve = resolve

    def parse(self, text: str) -> WebhookUrl:
        """Everything that can be known without asking a resolver. Raises BadWebhookUrl."""
        url = parse_webhook_url(text)
        if self._allows_private:
            return url
        if url.scheme != "https":
            raise BadWebhookUrl("it begins with http://; give one that begins with https://")
        if url.port not in self._ports:
            raise BadWebhookUrl(f"its port is {url.port}; allowed are: {', '.join(map(str, sorted(self._ports)))}")
        if is_local_name(url.host):
            raise BadWebhookUrl("its host is a name inside a network; give one that the internet knows")
        return url

    async def check(self, text: str) -> WebhookUrl:
        """As `parse`, and where its name leads now. A resolver that does not answer refuses nothing: every delivery
        asks again. Raises BadWebhookUrl."""
        url = self.parse(text)
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await self.addresses(url.host, url.port)
        except TargetRefused:
            raise BadWebhookUrl("its host has an address that is not public; give one that the internet sees") from None
        except TargetUnknown:
            raise BadWebhookUrl("its host has no address; check the name") from None
        except (OSError, TimeoutError):
            return url
        return url

    async def addresses(self, host: str, port: int) -> list[str]:
        """Where to connect for this name. Raises TargetRefused if one of them is not public, TargetUnknown, OSError."""
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
        if not self._allows_private and not all(map(is_public_address, found)):
            raise TargetRefused(host)
        return found


class GuardedNetwork(httpcore.AsyncNetworkBackend):
    """How httpcore's connections are made here. Host header and TLS keep the name; the socket gets the address."""

    def __init__(self, guard: TargetGuard, network: httpcore.AsyncNetworkBackend | None = None) -> None:
        self._guard = guard
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
            addresses = await self._guard.addresses(host, port)
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
            raise TargetRefused(f"connected to another address than {address}")
        return stream

    async def connect_unix_socket(
        self, path: str, timeout: float | None = None, socket_options: SocketOptions | None = None
    ) -> httpcore.AsyncNetworkStream:
        raise TargetRefused("webhooks do not use Unix sockets")

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
