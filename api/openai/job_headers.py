"""The job options that a request has in headers: to an OpenAI-like route, or to POST /v1/jobs."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from starlette.datastructures import Headers

from api.inputs import parse_idempotency_key
from dialects.native import WEEK_SECONDS, JobOptionFields
from domain.errors import InvalidRequest
from domain.job_options import NO_TIMEOUTS, JobOptions, Timeouts
from domain.webhooks import MAX_URL_BYTES

DEFAULT_READ_TIMEOUT_SECONDS = 600.0  # the default of the SDKs

RETRY_SECONDS = 60.0  # how long after a client's read timeout its retry may arrive

_DURATION = re.compile(r"(?:(\d{1,6})h)?(?:(\d{1,6})m)?(?:(\d{1,6}(?:\.\d{1,3})?)s?)?")


@dataclass(frozen=True, slots=True)
class JobHeaders:
    """The job options that a request has in headers. `read_timeout_seconds` is None if the client does not send it. A
    client that does waits that long without receiving anything, so it gets no keep-alive by default, and its answer has
    the right status."""

    idempotency_key: str | None
    cancel_after_seconds: float | None
    timeouts: Timeouts
    priority: int | None
    webhook_url: str | None
    on_disconnect: Literal["cancel", "continue"] | None
    has_keep_alive: bool
    read_timeout_seconds: float | None
    num_retries: int

    @property
    def attach_seconds(self) -> float:
        """How long after its acceptance a job may be matched to a retry of the same request."""
        return (self.read_timeout_seconds or DEFAULT_READ_TIMEOUT_SECONDS) + RETRY_SECONDS


NAMES = frozenset(  # of all that are read
    {
        b"cancel-after",
        b"idempotency-key",
        b"x-keep-alive",
        b"x-on-disconnect",
        b"x-priority",
        b"x-run-timeout",
        b"x-start-timeout",
        b"x-stainless-read-timeout",
        b"x-stainless-retry-count",
        b"x-stainless-timeout",
        b"x-webhook",
    }
)

NO_JOB_HEADERS = JobHeaders(None, None, NO_TIMEOUTS, None, None, None, True, None, 0)


def read_job_headers(headers: Headers) -> JobHeaders:
    """Raises InvalidRequest. The headers that SDKs add by themselves are ignored if they cannot be parsed."""
    found = [(name.decode(), value.decode("latin-1")) for name, value in headers.raw if name in NAMES]
    if not found:
        return NO_JOB_HEADERS
    return _read(dict(reversed(found)))  # of a name, the first counts


def with_headers(options: JobOptions, body: JobOptionFields, given: JobHeaders) -> JobOptions:
    """The options of the body, and from the headers those that it leaves out. Raises InvalidRequest."""
    if given == NO_JOB_HEADERS:
        return options
    if body.celery is not None and given.webhook_url is not None:
        raise InvalidRequest("X-Webhook and celery are both set; send only one of them", param="celery")
    own = Timeouts(options.start_timeout_seconds, options.run_timeout_seconds).or_else(given.timeouts)
    priority = options.priority if given.priority is None or "priority" in body.model_fields_set else given.priority
    return replace(
        options,
        priority=priority,
        start_timeout_seconds=own.start_seconds,
        run_timeout_seconds=own.run_seconds,
        deadline_after_seconds=given.cancel_after_seconds if body.deadline is None else None,
        webhook_url=given.webhook_url if body.webhook is None else body.webhook,
    )


def _read(given: Mapping[str, str]) -> JobHeaders:
    read_timeout_seconds = _number(given.get("x-stainless-read-timeout", given.get("x-stainless-timeout")))
    keep_alive = _one_of(given, "X-Keep-Alive", "on", "off") or ("on" if read_timeout_seconds is None else "off")
    return JobHeaders(
        idempotency_key=parse_idempotency_key(given.get("idempotency-key")),
        cancel_after_seconds=_duration(given, "Cancel-After"),
        timeouts=Timeouts(_duration(given, "X-Start-Timeout"), _duration(given, "X-Run-Timeout")),
        priority=_priority(given.get("x-priority")),
        webhook_url=_webhook_url(given.get("x-webhook")),
        on_disconnect=_on_disconnect(given),
        has_keep_alive=keep_alive == "on",
        read_timeout_seconds=read_timeout_seconds,
        num_retries=int(_number(given.get("x-stainless-retry-count")) or 0),
    )


def _duration(given: Mapping[str, str], name: str) -> float | None:
    """Seconds, as `90`, `90s`, `5m` or `1h30m`."""
    text = given.get(name.lower())
    if text is None:
        return None
    match = _DURATION.fullmatch(text.strip())
    hours, minutes, seconds = (float(part or 0) for part in match.groups()) if match else (0.0, 0.0, 0.0)
    duration = hours * 3600 + minutes * 60 + seconds
    if not 0 < duration <= WEEK_SECONDS:
        raise InvalidRequest(
            f"{name} is {text[:40]!r}; send a duration of at most a week, such as 90s, 5m or 1h30m", param=name
        )
    return duration


def _priority(text: str | None) -> int | None:
    if text is None:
        return None
    if not re.fullmatch(r"-?\d{1,2}", text) or not -10 <= int(text) <= 10:
        raise InvalidRequest(f"X-Priority is {text[:40]!r}; send a whole number from -10 to 10", param="X-Priority")
    return int(text)


def _webhook_url(text: str | None) -> str | None:
    if text is not None and not 1 <= len(text) <= MAX_URL_BYTES:
        raise InvalidRequest(
            f"X-Webhook has {len(text)} characters; send a URL of 1 to {MAX_URL_BYTES} characters", param="webhook"
        )
    return text


def _one_of(given: Mapping[str, str], name: str, *known: str) -> str | None:
    text = given.get(name.lower())
    if text is None:
        return None
    for word in known:
        if word == text:
            return word
    raise InvalidRequest(f"{name} is {text[:40]!r}; send {' or '.join(known)}", param=name)


def _on_disconnect(given: Mapping[str, str]) -> Literal["cancel", "continue"] | None:
    word = _one_of(given, "X-On-Disconnect", "cancel", "continue")
    return None if word is None else "cancel" if word == "cancel" else "continue"


def _number(text: str | None) -> float | None:
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if math.isfinite(number) and 0 < number <= WEEK_SECONDS else None
