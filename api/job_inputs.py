"""What the job routes read beside bodies: query strings and the headers that steer a request."""

import re
from collections.abc import Callable
from typing import Annotated, Literal
from uuid import UUID

from pydantic import AwareDatetime, BeforeValidator, Field
from starlette.requests import Request

from api.job_schemas import NO_NUL, JobOptionFields, MetadataKey, MetadataValue
from api.queries import QueryModel
from domain.errors import InvalidCursor, InvalidRequest
from domain.ids import parse_id
from domain.jobs import JobStatus

MAX_WAIT_SECONDS = 60

_WAIT = re.compile(r"(?:^|[,;\s])wait\s*=\s*\"?(\d{1,9})\"?", re.IGNORECASE)


def _refuse_number(value: object) -> object:
    """A number would be read as seconds since 1970, which no other time here is written as."""
    if isinstance(value, str) and not value[4:5] == "-":
        raise ValueError(f"it is {value[:40]!r}; write it as 2026-10-20T12:00:00Z")
    return value


class WaitQuery(QueryModel):
    wait: int = Field(default=0, ge=0, le=MAX_WAIT_SECONDS, description="Seconds to wait for the end of the job.")
    include: str = Field(default="", description="input, output, attempts; output of a running job is partial.")


class EventsQuery(QueryModel):
    starting_after: int | None = Field(default=None, description="The last sequence number seen.")
    from_: Literal["start", "snapshot", "now"] = Field(
        default="start", alias="from", description="Where to begin without a cursor."
    )
    include: str = Field(default="", description="token_ids: the tokens of each delta.")


class ListQuery(QueryModel):
    status: JobStatus | None = None
    model: str | None = Field(default=None, max_length=128, pattern=NO_NUL)
    created_after: Annotated[AwareDatetime | None, BeforeValidator(_refuse_number)] = None
    metadata: dict[MetadataKey, MetadataValue] = Field(
        default_factory=dict, max_length=16, description="metadata[key]=value"
    )
    after: str | None = Field(default=None, description="The last id of the page before.")
    limit: int = Field(default=20, ge=1, le=100)
    order: Literal["asc", "desc"] = "desc"


class OutputQuery(QueryModel):
    index: int = Field(default=0, ge=0, le=1_000, description="Which of the n choices, as text.")


def idempotency_key(request: Request, body: JobOptionFields) -> str | None:
    header = parse_idempotency_key(request.headers.get("idempotency-key"))
    if header is None:
        return body.idempotency_key
    if body.idempotency_key is not None and body.idempotency_key != header:
        raise InvalidRequest("Idempotency-Key and idempotency_key differ; send one of them", param="idempotency_key")
    return header


def parse_idempotency_key(header: str | None) -> str | None:
    """Raises InvalidRequest for one that cannot be."""
    if header is None:
        return None
    if not 1 <= len(header) <= 255 or not header.isascii() or not header.isprintable() or " " in header:
        raise InvalidRequest(
            f"Idempotency-Key has {len(header)} characters; send 1 to 255 visible ASCII characters without blanks",
            param="idempotency_key",
        )
    return header


def preferred_wait(prefer: str | None) -> int | None:
    """RFC 7240: what we cannot read is ignored, what is more than we grant is granted in part."""
    match = _WAIT.search(prefer or "")
    return min(int(match[1]), MAX_WAIT_SECONDS) if match else None


def included(include: str, known: set[str]) -> set[str]:
    names = {name.strip() for name in include.split(",") if name.strip()}
    if unknown := names - known:
        raise InvalidRequest(
            f"include names {sorted(unknown)[0][:64]!r}; known are: {', '.join(sorted(known))}", param="include"
        )
    return names


def page_cursor(after: str | None, parse: Callable[[str], UUID] = parse_id) -> UUID | None:
    """What the next page comes behind; `parse` reads an id of what is listed and raises ValueError."""
    try:
        return None if after is None else parse(after)
    except ValueError as exc:
        raise InvalidCursor(f"after: {exc}; send the last_id of the page before", param="after") from None


def stream_cursor(last_event_id: str | None, starting_after: int | None) -> int | None:
    """A browser that reconnects repeats its first URL, so the header is the newer one."""
    if last_event_id is None or not last_event_id.strip():
        return starting_after
    if not last_event_id.isascii() or not last_event_id.isdigit() or len(last_event_id) > 18:
        raise InvalidCursor(
            f"Last-Event-ID is {last_event_id[:40]!r}; send the id of the last event you saw", param="Last-Event-ID"
        )
    return int(last_event_id)


def accepts_json(accept: str) -> bool:
    """Plain text unless JSON is asked for and comes first."""
    kinds = [kind.partition(";")[0].strip().lower() for kind in accept.split(",")]
    wanted = [kind for kind in kinds if kind in ("application/json", "text/plain", "text/*", "*/*")]
    return bool(wanted) and wanted[0] == "application/json"
