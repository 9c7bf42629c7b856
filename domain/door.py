"""Who is let in where no key is asked for: this machine's own programs, and no web page that its browser has open.

A page can send requests to a server on the loopback interface. Two things in them cannot be forged by a page: the
`Host` that its browser thinks it talks to, which is the page's own name after DNS rebinding, and the page's `Origin`
(RFC 6454) with the `Sec-Fetch-*` of Fetch Metadata (https://www.w3.org/TR/fetch-metadata/).
"""

from collections.abc import Collection, Mapping
from ipaddress import ip_address
from urllib.parse import urlsplit

NAVIGATION = {"sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
MAX_SHOWN = 80  # characters of what somebody sent, in a refusal


class Door:
    """Judges requests by their headers. `allowed_hosts` are names beside the loopback ones, `*.example.com` any name
    below it; `cors_origins` are pages that may (`https://app.example.com`)."""

    def __init__(self, allowed_hosts: Collection[str] = (), cors_origins: Collection[str] = ()) -> None:
        self._hosts = {name.lower() for name in allowed_hosts}
        self._origins = {origin.lower() for origin in cors_origins}

    def refusal(self, method: str, headers: Mapping[str, str]) -> str | None:
        """Why this request stays outside; None lets it in. `headers` have lower-case names."""
        return self.refusal_of_host(headers) or self.refusal_of_page(method, headers)

    def refusal_of_host(self, headers: Mapping[str, str]) -> str | None:
        """A request without `Host` is HTTP/1.0, which no browser speaks."""
        host = headers.get("host", "localhost")
        if self._is_ours(_name_of(host)):
            return None
        return (
            f"the Host header is {host[:MAX_SHOWN]!r}; without keys this server answers to localhost, 127.0.0.1 "
            "and [::1] alone; add the name to CELERIAC_ALLOWED_HOSTS, or set CELERIAC_AUTH=api_key"
        )

    def refusal_of_page(self, method: str, headers: Mapping[str, str]) -> str | None:
        """Of what another page than the server's own sent, unless the settings name that page."""
        origin = headers.get("origin")
        if origin is not None:
            is_let_in = self._may_ask(origin, headers.get("host", ""))
            return None if is_let_in else _foreign_page(f"Origin is {origin[:MAX_SHOWN]!r}")
        site = headers.get("sec-fetch-site", "none")
        if site in ("none", "same-origin") or _is_navigation(method, headers):
            return None
        return _foreign_page(f"Sec-Fetch-Site is {site[:MAX_SHOWN]!r}")

    def _is_ours(self, name: str) -> bool:
        if is_loopback(name) or name in self._hosts:
            return True
        return any(pattern.startswith("*.") and name.endswith(pattern[1:]) for pattern in self._hosts)

    def _may_ask(self, origin: str, host: str) -> bool:
        """The server's own pages, and those that the settings name."""
        scheme, separator, place = origin.lower().partition("://")
        is_own = bool(separator) and scheme in ("http", "https") and place == host.lower()
        return is_own or origin.lower() in self._origins


def is_loopback(name: str) -> bool:
    """Whether a host name or address can only be this machine: RFC 6761 gives all of `.localhost` to it."""
    try:
        return ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")


def _name_of(host: str) -> str:
    """Without the port, in lower case; empty where it cannot be read, which is nobody's name."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
    return "" if any(character in host for character in "@/?#\\ \t") else name.removesuffix(".")


def _is_navigation(method: str, headers: Mapping[str, str]) -> bool:
    """Somebody followed a link, or typed: the page that they left sees nothing of the answer."""
    return method in ("GET", "HEAD") and all(headers.get(name) == value for name, value in NAVIGATION.items())


def _foreign_page(seen: str) -> str:
    return (
        f"{seen}: without keys no other web page may use this server; "
        "add its origin to CELERIAC_CORS_ORIGINS, or set CELERIAC_AUTH=api_key"
    )
