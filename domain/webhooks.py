"""Webhooks: parsing of URLs, event types, payloads, signatures, and the retry schedule.

`parse_webhook_url` is the only parser of webhook URLs: its result is what is stored and connected to, so no second
parser can see a different host in the same text. It is deliberately strict: `scheme://name[:port]/path[?query]` in
visible ASCII. A host must be a DNS name whose last label is not a number in any base, so that no form of an IP address
passes as a name.

Payload and signature follow Standard Webhooks (standardwebhooks.com), as the OpenAI SDK's `client.webhooks.unwrap`
checks them.
"""

import base64
import hmac
import json
import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from uuid import UUID

from domain.jobs import JobStatus, external_id

MAX_URL_BYTES = 2_048

DEFAULT_PORT_BY_SCHEME = {"https": 443, "http": 80}

_URL = re.compile(r"(https?)://([A-Za-z0-9._-]{1,253})(?::([0-9]{1,5}))?((?:/[!-~]*)?|\?[!-~]*)", re.ASCII)

_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?", re.ASCII)

_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*", re.ASCII)

#: Names of local machines, whatever a resolver says; every name that ends in one of them counts, too.
LOCAL_NAMES = ("localhost", "local", "internal", "localdomain", "home.arpa", "lan", "intranet", "onion")

_IPV6_UNICAST = ip_network("2000::/3")  # the rest of IPv6 is local, special or unassigned

#: Registered as global, but leading to other addresses: IPv4 inside IPv6, relays, protocol assignments.
_INDIRECT = [ip_network(text) for text in ("2001::/23", "2002::/16", "192.0.0.0/24", "192.88.99.0/24")]


class BadWebhookUrl(ValueError):
    """Says what is wrong with a URL and what to use instead, without repeating the URL, which may contain a token."""


@dataclass(frozen=True, slots=True)
class WebhookUrl:
    """A parsed URL. `str()` is the form that is stored; parsing it gives the same parts again."""

    scheme: str
    host: str
    port: int
    target: str  # path and query, at least "/"

    def __str__(self) -> str:
        port = "" if self.port == DEFAULT_PORT_BY_SCHEME[self.scheme] else f":{self.port}"
        return f"{self.scheme}://{self.host}{port}{self.target}"


def parse_webhook_url(text: str) -> WebhookUrl:
    """Raises BadWebhookUrl. Which schemes, ports and networks are allowed is checked elsewhere."""
    if len(text) > MAX_URL_BYTES:
        raise BadWebhookUrl(f"it has {len(text)} characters; use at most {MAX_URL_BYTES}")
    match = _URL.fullmatch(text)
    if match is None or "\\" in text or "#" in text:
        raise BadWebhookUrl(
            "it is not of the form https://name[:port]/path?query in visible ASCII characters, "
            "without user, password, fragment, backslash or IP address; correct it"
        )
    scheme, host, port, target = match[1], match[2].lower(), match[3], match[4]
    _refuse_bad_host(host)
    number = int(port) if port else DEFAULT_PORT_BY_SCHEME[scheme]
    if not 1 <= number <= 65_535:
        raise BadWebhookUrl(f"the port is {number}; use one from 1 to 65535")
    return WebhookUrl(scheme, host, number, target if target.startswith("/") else f"/{target}")


def _refuse_bad_host(host: str) -> None:
    labels = host.split(".")
    if not all(_LABEL.fullmatch(label) for label in labels):
        raise BadWebhookUrl("the host is not a DNS name; use one, with international names in their xn-- form")
    if _NUMBER.fullmatch(labels[-1]):
        raise BadWebhookUrl("the host is an IP address; use a DNS name")


def is_local_name(host: str) -> bool:
    """Whether the name is private: a single label, or a name with a suffix for private use."""
    return "." not in host or host.endswith(tuple(f".{name}" for name in LOCAL_NAMES))


def is_public_address(address: str) -> bool:
    """Whether this is a global unicast address that does not lead to another one. False for malformed or scoped
    ones."""
    try:
        parsed = ip_address(address)
    except ValueError:
        return False
    if isinstance(parsed, IPv6Address) and (parsed.scope_id is not None or parsed not in _IPV6_UNICAST):
        return False
    is_indirect = any(parsed in network for network in _INDIRECT if network.version == parsed.version)
    return parsed.is_global and not parsed.is_multicast and not parsed.is_reserved and not is_indirect


def is_in(address: str, networks: Iterable[IPv4Network | IPv6Network]) -> bool:
    """Whether this is an address in one of the networks. False for malformed or scoped ones."""
    try:
        parsed = ip_address(address)
    except ValueError:
        return False
    if isinstance(parsed, IPv6Address) and parsed.scope_id is not None:
        return False
    return any(parsed.version == network.version and parsed in network for network in networks)


#: The final statuses that a webhook can report.
TELLABLE_STATUSES = (JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.CANCELLED, JobStatus.EXPIRED)

#: Every event type that an endpoint may subscribe to. The part before the dot is the type of the object in `data.id`.
EVENT_TYPES = (
    *(f"job.{status.value}" for status in TELLABLE_STATUSES),
    *(f"response.{end}" for end in ("completed", "failed", "cancelled", "incomplete")),
    *(f"batch.{end}" for end in ("completed", "failed", "expired", "cancelled")),
)

PREFIX_BY_OBJECT = {"job": "job", "response": "resp", "batch": "batch"}

SECRET_PREFIX = "whsec_"  # noqa: S105  (the prefix of a secret)

NUM_SECRET_BYTES = 32

#: Seconds to wait after the 1st, 2nd, ... failed attempt. The last value repeats until RETRY_HOURS are over.
RETRY_SECONDS = (5.0, 30.0, 120.0, 600.0, 3_600.0, 14_400.0, 43_200.0, 86_400.0)

RETRY_HOURS = 72


class DeliveryStatus(StrEnum):
    PENDING = "pending"  # due at next_attempt_at
    DELIVERED = "delivered"  # the receiver answered 2xx
    FAILED = "failed"  # given up: no 2xx in 72 hours, or the endpoint was deleted


def new_secret() -> str:
    return SECRET_PREFIX + base64.b64encode(secrets.token_bytes(NUM_SECRET_BYTES)).decode()


def payload(event_id: UUID, event_type: str, created_at: datetime) -> bytes:
    """The body of an event; every attempt sends the same bytes."""
    object_name = event_type.partition(".")[0]
    event = {
        "id": external_id(event_id, "evt"),
        "object": "event",
        "created_at": int(created_at.timestamp()),
        "type": event_type,
        "data": {"id": external_id(event_id, PREFIX_BY_OBJECT[object_name])},
    }
    return json.dumps(event, separators=(",", ":")).encode()


def signature_headers(event_id: UUID, body: bytes, signing_secrets: Sequence[str], at: int) -> dict[str, str]:
    """The three headers of Standard Webhooks. `at` is the time of this attempt in seconds since 1970: receivers refuse
    anything older than 5 minutes. One signature per secret, so that during a rotation either one verifies."""
    webhook_id = external_id(event_id, "evt")
    signed = f"{webhook_id}.{at}.".encode() + body
    signatures = [
        base64.b64encode(hmac.digest(base64.b64decode(secret.removeprefix(SECRET_PREFIX)), signed, "sha256")).decode()
        for secret in signing_secrets
    ]
    return {
        "webhook-id": webhook_id,
        "webhook-timestamp": str(at),
        "webhook-signature": " ".join(f"v1,{signature}" for signature in signatures),
    }


def secret_hint(secret: str) -> str:
    """Enough of a secret to tell it from others, too little to sign with."""
    return f"{SECRET_PREFIX}...{secret[-4:]}"
