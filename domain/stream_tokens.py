"""Stream tokens: what a browser sends in place of a key to read one job's stream, since `EventSource` has no headers.

A token is `st.<key id>.<job id>.<expiry>.<signature>`. Nothing of it is stored: the signature is an HMAC-SHA-256 under
the signing key of the tenant, so that every API process can check it. It is valid as long as the key that asked for it.
"""

import base64
import hmac
import re
import time
from dataclasses import dataclass
from typing import Self
from uuid import UUID

from domain.jobs import external_id, parse_id

PREFIX = "st"

MAX_TOKEN_LENGTH = 256

NO_KEY = "none"  # in the place of a key's id, where no key is required

_FORM = re.compile(r"st\.([A-Za-z0-9]{1,64})\.(job_[0-9A-Z]{26})\.([1-9][0-9]{0,11})\.([A-Za-z0-9_-]{43})")


@dataclass(frozen=True, slots=True)
class StreamToken:
    """What a token says. It is true only if `is_signed_with` the tenant's signing key, and until it `is_expired`."""

    key_id: str  # of the API key that asked for it, or NO_KEY
    job_id: UUID
    expires_at: int  # Unix time in seconds
    signature: str = ""

    @classmethod
    def read(cls, text: str) -> Self:
        """Raises ValueError, without the token in its message."""
        found = _FORM.fullmatch(text) if len(text) <= MAX_TOKEN_LENGTH else None
        if found is None:
            raise ValueError("a stream token has the form st.<key id>.<job id>.<expiry>.<signature>")
        key_id, job_id, expires_at, signature = found.groups()
        return cls(key_id, parse_id(job_id), int(expires_at), signature)

    @property
    def is_expired(self) -> bool:
        return time.time() >= self.expires_at

    def signed(self, signing_key: UUID) -> str:
        """The token as text."""
        claim = f"{PREFIX}.{self.key_id}.{external_id(self.job_id)}.{self.expires_at}"
        digest = hmac.digest(signing_key.bytes, claim.encode(), "sha256")
        return f"{claim}.{base64.urlsafe_b64encode(digest).decode().rstrip('=')}"

    def is_signed_with(self, signing_key: UUID) -> bool:
        return hmac.compare_digest(self.signed(signing_key).rpartition(".")[2], self.signature)
