"""Addresses from the settings: which hosts and web origins may use the API without a key, and where Redis is.

Without keys, programs on this machine may use the API, but web pages open in its browser may not. Such a page can send
requests to the loopback interface, but it cannot forge the `Host` header (after DNS rebinding it is the page's own
name), `Origin` (RFC 6454) or the `Sec-Fetch-*` headers of Fetch Metadata (https://www.w3.org/TR/fetch-metadata/).

One Redis URL serves both redis-py and Celery's transport (kombu). They spell databases, Unix sockets and TLS
differently and have different defaults for verification; kombu leaves `rediss://` unverified. Sources: redis-py
`Redis.from_url`, Celery "Using Redis" and `broker_use_ssl`.

The database's URL is libpq's, with one parameter of ours, which says how a pooler in between lends its sessions.
"""

import difflib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import ip_address
from pathlib import Path
from types import MappingProxyType
from typing import Self
from urllib.parse import SplitResult, parse_qsl, unquote, urlencode, urlsplit

NAVIGATION = {"sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}

MAX_REMEMBERED = 256  # host names that were parsed: all requests of a machine name the same few

POOL_MODE = "pool_mode"  # a parameter of the database's URL, by PgBouncer's word for it

TRANSACTION_MODE = "transaction"

MAX_SHOWN = 80  # how many characters of a header value a refusal repeats


class OriginPolicy:
    """Decides by their headers which requests are allowed without a key. `allowed_hosts` are host names besides the
    loopback ones, where `*.example.com` is any name below example.com; `cors_origins` are the origins of the web pages
    that may use the API, such as `https://app.example.com`."""

    def __init__(self, allowed_hosts: Collection[str] = (), cors_origins: Collection[str] = ()) -> None:
        self._hosts = {name.lower() for name in allowed_hosts}
        self._origins = {origin.lower() for origin in cors_origins}

    def refusal(self, method: str, headers: Mapping[str, str]) -> str | None:
        """Why this request is refused; None if it is allowed. `headers` has lower-case names."""
        return self.refusal_of_host(headers) or self.refusal_of_page(method, headers)

    def refusal_of_host(self, headers: Mapping[str, str]) -> str | None:
        """Why the `Host` is refused. A request without one is HTTP/1.0, which browsers do not speak."""
        host = headers.get("host", "localhost")
        if self._is_ours(_name_of(host)):
            return None
        return (
            f"the Host header is {host[:MAX_SHOWN]!r}; without keys this server answers only to localhost, 127.0.0.1 "
            "and [::1]; add the name to CELERIAC_ALLOWED_HOSTS, or set CELERIAC_AUTH=api_key"
        )

    def refusal_of_page(self, method: str, headers: Mapping[str, str]) -> str | None:
        """Why the request's page is refused: it is neither the server's own nor named in the settings."""
        origin = headers.get("origin")
        if origin is not None:
            is_allowed = self._is_allowed(origin, headers.get("host", ""))
            return None if is_allowed else _foreign_page(f"Origin is {origin[:MAX_SHOWN]!r}")
        site = headers.get("sec-fetch-site", "none")
        if site in ("none", "same-origin") or _is_navigation(method, headers):
            return None
        return _foreign_page(f"Sec-Fetch-Site is {site[:MAX_SHOWN]!r}")

    def _is_ours(self, name: str) -> bool:
        if is_loopback(name) or name in self._hosts:
            return True
        return any(pattern.startswith("*.") and name.endswith(pattern[1:]) for pattern in self._hosts)

    def _is_allowed(self, origin: str, host: str) -> bool:
        """True for the server's own pages and those that the settings name."""
        scheme, separator, place = origin.lower().partition("://")
        is_own = bool(separator) and scheme in ("http", "https") and place == host.lower()
        return is_own or origin.lower() in self._origins


@lru_cache(maxsize=MAX_REMEMBERED)
def is_loopback(name: str) -> bool:
    """Whether a host name or address can only mean this machine; RFC 6761 reserves all of `.localhost` for it."""
    try:
        return ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")


@lru_cache(maxsize=MAX_REMEMBERED)
def _name_of(host: str) -> str:
    """The host without its port, in lower case; empty, which matches nothing, if it cannot be parsed."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
    return "" if any(character in host for character in "@/?#\\ \t") else name.removesuffix(".")


def _is_navigation(method: str, headers: Mapping[str, str]) -> bool:
    """Whether the user followed a link or typed the address: then no other page sees the answer."""
    return method in ("GET", "HEAD") and all(headers.get(name) == value for name, value in NAVIGATION.items())


def _foreign_page(seen: str) -> str:
    return (
        f"{seen}; without keys, pages of other origins may not use this server; "
        "add the origin to CELERIAC_CORS_ORIGINS, or set CELERIAC_AUTH=api_key"
    )


SCHEMES = ("redis://", "rediss://", "unix://", "redis+socket://")

TRUE, FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")

MAX_HEALTH_CHECK_SECONDS = 3600

TLS_PATHS = ("ssl_ca_certs", "ssl_ca_path", "ssl_certfile", "ssl_keyfile")

TLS_OPTIONS = ("ssl_cert_reqs", "ssl_check_hostname", *TLS_PATHS)

SOCKET_OPTIONS = ("health_check_interval", "socket_keepalive")

OUR_TIMEOUTS = ("socket_timeout", "socket_connect_timeout", "timeout")

OPTIONS = ("db", *SOCKET_OPTIONS, *TLS_OPTIONS)

Options = Mapping[str, str | int | bool]


class UnreadableRedisUrl(ValueError):
    """The message says which part is wrong, without repeating anything that may be a password."""


@dataclass(frozen=True, slots=True)
class RedisUrl:
    """A parsed Redis URL. `where` is host and port, or the path of a Unix socket."""

    scheme: str
    credentials: str  # as in the URL, with the @; may be empty
    where: str
    database: int
    tls: Options
    sockets: Options

    @classmethod
    def read(cls, url: str) -> Self:
        """Raises UnreadableRedisUrl."""
        if not url.startswith(SCHEMES):
            raise UnreadableRedisUrl(f"it does not begin with one of {', '.join(SCHEMES)}")
        parts = _split(url)
        scheme = "unix" if parts.scheme == "redis+socket" else parts.scheme
        options = _options(parts.query)
        database = _database(options, "" if scheme == "unix" else unquote(parts.path).strip("/"))
        credentials, at, host = parts.netloc.rpartition("@")
        if scheme == "unix" and (host or len(parts.path) < 2):
            raise UnreadableRedisUrl("the URL of a socket must have its absolute path: unix:///path/to/socket?db=0")
        return cls(
            scheme,
            credentials + at,
            parts.path if scheme == "unix" else host or "localhost",
            database,
            _tls(scheme, options),
            MappingProxyType({name: _socket(name, options[name]) for name in SOCKET_OPTIONS if name in options}),
        )

    @property
    def for_redis(self) -> str:
        """The URL in redis-py's form."""
        options = {name: str(value) for name, value in (*self.tls.items(), *self.sockets.items())}
        if self.scheme == "unix":
            options = {"db": str(self.database)} | options
        query = f"?{urlencode(options)}" if options else ""
        path = "" if self.scheme == "unix" else f"/{self.database}"
        return f"{self.scheme}://{self.credentials}{self.where}{path}{query}"

    @property
    def for_celery(self) -> str:
        """The URL in the form of kombu and Flower. Options for TLS and sockets are set elsewhere: in `broker_use_ssl`
        and in the transport's options."""
        if self.scheme == "unix":
            return f"redis+socket://{self.credentials}{self.where}?virtual_host={self.database}"
        return f"{self.scheme}://{self.credentials}{self.where}/{self.database}"


def _split(url: str) -> SplitResult:
    malformed = UnreadableRedisUrl(
        "it is not of the form scheme://user:password@host:port/name with a number as port; "
        "write / as %2F, @ as %40, : as %3A, # as %23 and ? as %3F in a password"
    )
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise malformed from None
    if parts.fragment or parts.netloc.count("@") > 1:
        raise malformed
    return parts


def _options(query: str) -> dict[str, str]:
    options: dict[str, str] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        name = "db" if name == "virtual_host" else name
        if name in OUR_TIMEOUTS:
            raise UnreadableRedisUrl(
                f"its option {name!r} cannot be set in the URL, as each use has its own timeout; leave it out"
            )
        if name not in OPTIONS:
            close = difflib.get_close_matches(name.lower(), OPTIONS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"the options are {', '.join(OPTIONS)}"
            where = "; put user and password before the host" if name in ("username", "password") else ""
            tls = "; for TLS write rediss://" if name in ("ssl", "tls") else ""
            raise UnreadableRedisUrl(f"it has an unknown option {name[:40]!r}{where}{tls}; {hint}")
        if options.get(name, value) != value:
            raise UnreadableRedisUrl(f"its option {name!r} appears twice; remove one")
        options[name] = value
    return options


def _database(options: Mapping[str, str], path: str) -> int:
    given = {value for value in (path, options.get("db", "")) if value}
    if len(given) > 1:
        raise UnreadableRedisUrl("its path and its option 'db' name different databases; remove one")
    text = given.pop() if given else "0"
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise UnreadableRedisUrl(f"its database is {text[:40]!r}; use a number, as in redis://host:6379/0")
    return int(text)


def _tls(scheme: str, options: Mapping[str, str]) -> Options:
    """Everything about verifying the server's identity, made explicit, so that no client's own defaults apply."""
    given = {name: options[name] for name in TLS_OPTIONS if name in options}
    if scheme != "rediss":
        if given:
            raise UnreadableRedisUrl(f"its option {min(given)!r} needs TLS; write rediss:// instead of {scheme}://")
        return MappingProxyType({})
    for name in TLS_PATHS:
        if name in given and not Path(given[name]).exists():
            raise UnreadableRedisUrl(f"its {name} is {given[name]!r}, but there is no such file; correct the path")
    if "ssl_keyfile" in given and "ssl_certfile" not in given:
        raise UnreadableRedisUrl("it has ssl_keyfile but not ssl_certfile; set both")
    requirement = given.get("ssl_cert_reqs", "required").lower().removeprefix("ssl.").removeprefix("cert_")
    if requirement not in ("required", "optional", "none"):
        raise UnreadableRedisUrl(
            f"its ssl_cert_reqs is {given['ssl_cert_reqs'][:40]!r}; use required (the default), optional or none"
        )
    checks_name = requirement != "none" and _truth("ssl_check_hostname", given.get("ssl_check_hostname", "true"))
    return MappingProxyType(given | {"ssl_cert_reqs": requirement, "ssl_check_hostname": checks_name})


def _socket(name: str, text: str) -> int | bool:
    if name == "socket_keepalive":
        return _truth(name, text)
    if not re.fullmatch(r"[0-9]{1,4}", text) or not 1 <= int(text) <= MAX_HEALTH_CHECK_SECONDS:
        raise UnreadableRedisUrl(f"its {name} is {text[:40]!r}; use whole seconds, 1 to {MAX_HEALTH_CHECK_SECONDS}")
    return int(text)


def _truth(name: str, text: str) -> bool:
    if text.lower() not in TRUE + FALSE:
        raise UnreadableRedisUrl(f"its {name} is {text[:40]!r}; use true or false")
    return text.lower() in TRUE
