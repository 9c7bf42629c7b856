"""One POST to a webhook's receiver: bounded in time and bytes, over guarded connections, its outcome a value."""

import asyncio
import ssl
import time
from dataclasses import dataclass

import httpcore

from domain.webhook_urls import WebhookUrl
from tasks.webhook_connections import Connections
from tasks.webhook_guard import CONNECT_SECONDS, GuardedNetwork, TargetGuard, TargetRefused, TargetUnknown

TOTAL_SECONDS = 10.0
MAX_ANSWER_BYTES = 4_096
MAX_CONNECTIONS = 256
USER_AGENT = "Celeriac-Webhooks/1"


@dataclass(frozen=True, slots=True)
class WebhookResponse:
    """How an attempt went: the receiver's status code, or why there is none."""

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
    """For one event loop. Keeps connections for a few seconds, each to an address that was checked when it was made."""

    def __init__(self, guard: TargetGuard, network: httpcore.AsyncNetworkBackend | None = None) -> None:
        self._connections = Connections(GuardedNetwork(guard, network), MAX_CONNECTIONS)

    async def aclose(self) -> None:
        await self._connections.aclose()

    async def post(self, url: WebhookUrl, headers: dict[str, str], body: bytes) -> WebhookResponse:
        """Never raises for what the receiver or the network does. The answer's body is dropped."""
        began_at = time.monotonic()
        status_code, error = None, None
        try:
            async with asyncio.timeout(TOTAL_SECONDS):
                status_code = await self._post(url, headers, body)
        except (TimeoutError, httpcore.TimeoutException):
            error = "timeout"
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
