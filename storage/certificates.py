"""When the certificates of PostgreSQL and Redis expire, by a handshake with each that ends before a word is said."""

import socket
import ssl
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from sqlalchemy import Connection

from domain.addresses import RedisUrl

SOON_DAYS = 14.0
RENEW = "renew it, or nobody is let in from then on"
HANDSHAKE_SECONDS = 5.0
ASK_FOR_TLS = struct.pack("!ii", 8, 80877103)  # PostgreSQL's SSLRequest
VERIFIES = ("verify-ca", "verify-full")


@dataclass(frozen=True, slots=True)
class VerifiedServer:
    """One that is reached with TLS, and whose certificate is verified: else it may be of any age."""

    name: str
    host: str
    port: int
    greeting: bytes  # what asks for TLS, where it does not begin with it
    authorities: str | None  # None: those of this machine
    own_certificate: str | None
    own_key: str | None

    def expires_soon(self) -> str | None:
        """What to say if it does. Blocks for a handshake."""
        days = self.days_left()
        if days is None or days > SOON_DAYS:
            return None
        return f"the certificate of {self.name} expires in {days:.0f} days"

    def days_left(self) -> float | None:
        """Until its certificate expires; None if there is no handshake, as a connection tells why."""
        try:
            context = ssl.create_default_context(cafile=self.authorities)
            context.check_hostname = False
            if self.own_certificate is not None:
                context.load_cert_chain(self.own_certificate, self.own_key)
            with socket.create_connection((self.host, self.port), timeout=HANDSHAKE_SECONDS) as raw:
                if self.greeting:
                    raw.sendall(self.greeting)
                    raw.recv(1)
                with context.wrap_socket(raw, server_hostname=self.host) as secured:
                    told = secured.getpeercert() or {}
        except OSError:
            return None
        return (ssl.cert_time_to_seconds(str(told["notAfter"])) - time.time()) / 86400 if "notAfter" in told else None


def postgres_server(connection: Connection) -> VerifiedServer | None:
    """The one of several that this connection leads to."""
    info = connection.connection.driver_connection.info  # type: ignore[union-attr]
    return verified_postgres(info.get_parameters(), info.host, info.port)


def verified_postgres(told: Mapping[str, str], host: str, port: int) -> VerifiedServer | None:
    """`told` is what libpq was told, which leaves out where it looks without being told."""
    if told.get("sslmode") not in VERIFIES or host.startswith("/"):
        return None
    authorities, own_certificate, own_key = (
        told.get(name) or _untold(file)
        for name, file in (("sslrootcert", "root.crt"), ("sslcert", "postgresql.crt"), ("sslkey", "postgresql.key"))
    )
    return VerifiedServer(
        "PostgreSQL",
        host,
        port,
        ASK_FOR_TLS,
        None if authorities == "system" else authorities,
        own_certificate,
        own_key,
    )


def _untold(file: str) -> str | None:
    path = Path.home() / ".postgresql" / file
    return str(path) if path.exists() else None


def redis_server(url: RedisUrl) -> VerifiedServer | None:
    if url.scheme != "rediss" or url.tls.get("ssl_cert_reqs") == "none":
        return None
    where = urlsplit(f"//{url.where}")
    authorities, own_certificate, own_key = (
        str(url.tls[name]) if name in url.tls else None for name in ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
    )
    return VerifiedServer(
        "Redis", where.hostname or "localhost", where.port or 6379, b"", authorities, own_certificate, own_key
    )
