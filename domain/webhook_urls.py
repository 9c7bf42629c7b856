"""The one parser of webhook URLs. What it returns is what is stored and connected to, so that no second parser can see
another host in the same text.

It takes little on purpose: `scheme://name[:port]/path[?query]` in visible ASCII. A host must be a DNS name whose last
label is not a number, in any base, so no spelling of an address passes for a name.
"""

import re
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address, ip_network

MAX_URL_BYTES = 2_048
DEFAULT_PORT_BY_SCHEME = {"https": 443, "http": 80}

_URL = re.compile(r"(https?)://([A-Za-z0-9._-]{1,253})(?::([0-9]{1,5}))?((?:/[!-~]*)?|\?[!-~]*)", re.ASCII)
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?", re.ASCII)
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*", re.ASCII)

#: Names that mean a machine of ours whatever a resolver says; matched with all that ends in them.
LOCAL_NAMES = ("localhost", "local", "internal", "localdomain", "home.arpa", "lan", "intranet", "onion")

_IPV6_UNICAST = ip_network("2000::/3")  # the rest of IPv6 is local, special or not given out

#: Global by the registry, and yet a way to addresses that are not: IPv4 inside IPv6, relays, protocol assignments.
_INDIRECT = [ip_network(text) for text in ("2001::/23", "2002::/16", "192.0.0.0/24", "192.88.99.0/24")]


class BadWebhookUrl(ValueError):
    """Says what is wrong with a URL and what to give instead, without repeating it: it may hold a token."""


@dataclass(frozen=True, slots=True)
class WebhookUrl:
    """A URL whose parts are known. `str()` spells it as it is stored, to be parsed to the same parts again."""

    scheme: str
    host: str
    port: int
    target: str  # path and query, at least "/"

    def __str__(self) -> str:
        port = "" if self.port == DEFAULT_PORT_BY_SCHEME[self.scheme] else f":{self.port}"
        return f"{self.scheme}://{self.host}{port}{self.target}"


def parse_webhook_url(text: str) -> WebhookUrl:
    """Raises BadWebhookUrl. Which schemes, ports and networks are allowed is judged elsewhere."""
    if len(text) > MAX_URL_BYTES:
        raise BadWebhookUrl(f"it has {len(text)} characters; give at most {MAX_URL_BYTES}")
    match = _URL.fullmatch(text)
    if match is None or "\\" in text or "#" in text:
        raise BadWebhookUrl(
            "it is not of the form https://name[:port]/path?query in visible ASCII characters, "
            "without user, password, fragment, backslash or address; give one that is"
        )
    scheme, host, port, target = match[1], match[2].lower(), match[3], match[4]
    _refuse_bad_host(host)
    number = int(port) if port else DEFAULT_PORT_BY_SCHEME[scheme]
    if not 1 <= number <= 65_535:
        raise BadWebhookUrl(f"its port is {number}; give one from 1 to 65535")
    return WebhookUrl(scheme, host, number, target if target.startswith("/") else f"/{target}")


def _refuse_bad_host(host: str) -> None:
    labels = host.split(".")
    if not all(_LABEL.fullmatch(label) for label in labels):
        raise BadWebhookUrl("its host is no DNS name; write one, an international one in its xn-- form")
    if _NUMBER.fullmatch(labels[-1]):
        raise BadWebhookUrl("its host is an IP address; give a DNS name")


def is_local_name(host: str) -> bool:
    """A name that no public resolver knows: a single label, or one under a suffix for private use."""
    return "." not in host or host.endswith(tuple(f".{name}" for name in LOCAL_NAMES))


def is_public_address(address: str) -> bool:
    """Whether an address is global unicast and leads nowhere else. False for what is none, and for scoped ones."""
    try:
        parsed = ip_address(address)
    except ValueError:
        return False
    if isinstance(parsed, IPv6Address) and (parsed.scope_id is not None or parsed not in _IPV6_UNICAST):
        return False
    is_indirect = any(parsed in network for network in _INDIRECT if network.version == parsed.version)
    return parsed.is_global and not parsed.is_multicast and not parsed.is_reserved and not is_indirect
