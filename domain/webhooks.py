"""Webhooks in words: the types of events, what is sent, how it is signed, and when it is tried again.

The form is Standard Webhooks (standardwebhooks.com), as the OpenAI SDK's `client.webhooks.unwrap` checks it.
"""

import base64
import hmac
import json
import secrets
from collections.abc import Sequence
from datetime import datetime
from enum import StrEnum
from uuid import UUID

from domain.ids import external_id
from domain.jobs import JobStatus

#: The ends of a job that a webhook can tell of.
TELLABLE_STATUSES = (JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.CANCELLED, JobStatus.EXPIRED)

#: Every type an endpoint may ask for. The part before the dot says what `data.id` is.
EVENT_TYPES = (
    *(f"job.{status.value}" for status in TELLABLE_STATUSES),
    *(f"response.{end}" for end in ("completed", "failed", "cancelled", "incomplete")),
    *(f"batch.{end}" for end in ("completed", "failed", "expired", "cancelled")),
)
PREFIX_BY_OBJECT = {"job": "job", "response": "resp", "batch": "batch"}

SECRET_PREFIX = "whsec_"  # noqa: S105  (what a secret begins with)
NUM_SECRET_BYTES = 32

#: Seconds to wait after the 1st, 2nd, ... failed attempt; the last one again and again, until 72 hours are over.
RETRY_SECONDS = (5.0, 30.0, 120.0, 600.0, 3_600.0, 14_400.0, 43_200.0, 86_400.0)
RETRY_HOURS = 72


class DeliveryStatus(StrEnum):
    PENDING = "pending"  # due at next_attempt_at
    DELIVERED = "delivered"  # the receiver answered 2xx
    FAILED = "failed"  # given up: no 2xx in 72 hours, or the receiver is gone


def new_secret() -> str:
    return SECRET_PREFIX + base64.b64encode(secrets.token_bytes(NUM_SECRET_BYTES)).decode()


def payload(event_id: UUID, event_type: str, created_at: datetime) -> bytes:
    """The body of an event, the same bytes at every attempt."""
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
    """The three headers of Standard Webhooks. `at` is in seconds since 1970, by the clock of this attempt: receivers
    refuse what is more than 5 minutes old. One signature per secret, so that either one of a rotation verifies."""
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
    """Enough to tell two secrets apart, too little to sign with."""
    return f"{SECRET_PREFIX}...{secret[-4:]}"
