"""Texts that clients keep for us: readable, and sealed with a key of their tenant, so that none can be made up."""

import base64
import binascii
import hashlib
import hmac

PREFIX = "celeriac1."

NUM_SEAL_BYTES = hashlib.sha256().digest_size


def seal(text: str, key: bytes) -> str:
    """The text with its seal, as ASCII."""
    body = text.encode()
    return PREFIX + base64.urlsafe_b64encode(_seal_of(body, key) + body).decode()


def is_sealed(value: object) -> bool:
    """Whether the value looks as if `seal` had made it."""
    return isinstance(value, str) and value.startswith(PREFIX)


def opened(sealed: str, key: bytes) -> str | None:
    """The text, or None unless `seal` made this of it with the same key."""
    try:
        content = base64.b64decode(sealed.removeprefix(PREFIX), altchars=b"-_", validate=True)
    except (ValueError, binascii.Error):
        return None
    given, body = content[:NUM_SEAL_BYTES], content[NUM_SEAL_BYTES:]
    if not is_sealed(sealed) or not hmac.compare_digest(given, _seal_of(body, key)):
        return None
    return body.decode()


def _seal_of(body: bytes, key: bytes) -> bytes:
    return hmac.digest(key, body, "sha256")
