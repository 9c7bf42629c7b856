"""What routes read from a request: JSON bodies, query strings, and headers that steer it.

JSON bodies in: strict, bounded, and refused with the field, the value seen and the remedy.

Nothing here takes more than linear time, and little of that for what is refused: lengths come first, then the first
error alone. What is done to a large body is done off the event loop.

Query strings: typed, bounded, and refused like bodies where a name is unknown or a value cannot be; and the pages of
lists, which are asked for with them.

What the job routes read besides bodies: query strings, and headers with options of a request.
"""

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, ParamSpec, TypeVar, get_args, get_origin
from uuid import UUID

from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from starlette.requests import Request
from starlette.responses import Response

from api.errors import RequestTimeout, UnsupportedMediaType, json_response
from api.services import caller_of, services_of
from dialects.bodies import Model, invalid_request, parse_model
from dialects.fields import HintTree
from dialects.native import NO_NUL, JobOptionFields, MetadataKey, MetadataValue
from dialects.openai_views import REFERENCE, View, page
from domain.errors import InvalidCursor, InvalidRequest
from domain.jobs import FirstErrorModel, JobStatus, parse_id, parse_id_of_other

BODY_SECONDS = 30.0

P = ParamSpec("P")

WorkResult = TypeVar("WorkResult")


async def read_model(request: Request, model: type[Model], hints: HintTree | None = None) -> Model:
    """The body as a `model`, without what `hints` let be left out. Raises InvalidRequest or UnsupportedMediaType; the
    size was bounded by the middleware."""
    require_json(request)
    return await off_loop(request, parse_model, await read_body(request), model, hints)


async def off_loop(
    request: Request, function: Callable[P, WorkResult], *args: P.args, **kwargs: P.kwargs
) -> WorkResult:
    """What takes time with the size of a body, which was read: in a thread where it is a large one. Raises what
    `function` does, and ServerOverloaded."""
    large_work = services_of(request).large_work
    return await large_work.run(len(await request.body()), function, *args, **kwargs)


async def read_body(request: Request) -> bytes:
    """The whole body. Raises RequestTimeout for one that trickles in."""
    try:
        async with asyncio.timeout(BODY_SECONDS):
            return await request.body()
    except TimeoutError:
        raise RequestTimeout(f"the body did not arrive within {BODY_SECONDS:.0f} s; send it at once") from None


def require_json(request: Request) -> None:
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        seen = f"Content-Type is {content_type[:64]!r}" if content_type else "Content-Type is missing"
        raise UnsupportedMediaType(f"{seen}; send JSON as application/json")
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding != "identity":
        raise UnsupportedMediaType(f"Content-Encoding is {encoding[:32]!r}; send the body uncompressed")


Query = TypeVar("Query", bound="QueryModel")

Listed = TypeVar("Listed")

MAX_PARAMETERS = 64  # no route has half as many, those of a mapping counted one by one


class QueryModel(FirstErrorModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def lists(cls) -> set[str]:
        """The parameters that may come more than once."""
        return {
            name
            for name, field in cls.model_fields.items()
            if any(map(_is_list, (field.annotation, *get_args(field.annotation))))
        }


class PageQuery(QueryModel):
    after: str | None = Field(default=None, description="The last id of the page before.")
    limit: int = Field(default=20, ge=1, le=100)

    def cursor(self, prefix: str | None = None) -> UUID | None:
        """The id that the page begins after: of a job, or of what has ids with this prefix. Raises InvalidCursor."""
        if self.after is None:
            return None
        try:
            return parse_id(self.after) if prefix is None else parse_id_of_other(self.after, prefix)
        except ValueError as exc:
            raise InvalidCursor(f"after: {exc}; send the last_id of the page before", param="after") from None

    def items_after(self, items: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
        """Of a list that is here whole. Raises InvalidCursor."""
        ids = [item["id"] for item in items]
        if self.after is not None and self.after not in ids:
            raise InvalidCursor(
                f"after is {self.after[:64]!r}, which is not in this list; send a last_id", param="after"
            )
        return items if self.after is None else items[ids.index(self.after) + 1 :]


async def list_page(
    request: Request,
    query: PageQuery,
    reader: Callable[..., Sequence[Listed]],
    view: Callable[[Listed], Mapping[str, Any]],
    *,
    prefix: str | None = None,
    **filters: object,
) -> Response:
    """A page of what `reader(session, tenant_id, after=, limit=, **filters)` finds, whose ids have `prefix`: without
    one, of jobs. Raises InvalidCursor."""
    services, tenant_id = caller_of(request)
    after = query.cursor(prefix)
    found = await services.read(reader, tenant_id, after=after, limit=query.limit + 1, **filters)
    return json_response(page([view(one) for one in found], query.limit))


def listing(view: type[View], query: type[PageQuery]) -> dict[str, Any]:
    """The options of a route that lists: what it answers, and what it reads from its query string."""
    return {"responses": {200: {"model": view}}, "openapi_extra": {"parameters": query_parameters(query)}}


def _is_list(annotation: object) -> bool:
    return get_origin(annotation) is list


def read_query(request: Request, model: type[Query]) -> Query:
    """`a[k]=v` becomes the entry k of the mapping a, and `a`, `a[]` or `a[0]` an item of the list a. Raises
    InvalidRequest, also for an unknown or repeated name."""
    parameters = request.query_params.multi_items()
    if len(parameters) > MAX_PARAMETERS:
        raise InvalidRequest(
            f"the query has {len(parameters)} parameters; at most {MAX_PARAMETERS} are read, send fewer"
        )
    given: dict[str, Any] = {}
    for name, value in parameters:
        outer, bracket, key = name.partition("[")
        if outer in model.lists():
            given.setdefault(outer, []).append(value)
            continue
        is_entry = bool(bracket) and key.endswith("]")
        target: dict[str, Any] = given.setdefault(outer, {}) if is_entry else given
        label = key[:-1] if is_entry else name
        if not isinstance(target, dict) or label in target:
            raise InvalidRequest(f"{name[:64]} appears more than once; send it once", param=name[:64])
        target[label] = value
    try:
        return model.model_validate(given)
    except ValidationError as exc:
        raise invalid_request(exc, model) from None


def query_parameters(model: type[BaseModel]) -> list[Mapping[str, object]]:
    """The parameters of `model` as OpenAPI lists them."""
    whole = model.model_json_schema(ref_template=REFERENCE)
    defs = {"$defs": whole["$defs"]} if "$defs" in whole else {}
    return [
        {"name": name, "in": "query", "required": False, "schema": schema | defs, **_style(schema)}
        for name, schema in whole["properties"].items()
    ]


def _style(schema: Mapping[str, object]) -> dict[str, object]:
    return {"style": "deepObject", "explode": True} if schema.get("type") == "object" else {}


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


class ListQuery(PageQuery):
    status: JobStatus | None = None
    model: str | None = Field(default=None, max_length=128, pattern=NO_NUL)
    created_after: Annotated[AwareDatetime | None, BeforeValidator(_refuse_number)] = None
    metadata: dict[MetadataKey, MetadataValue] = Field(
        default_factory=dict, max_length=16, description="metadata[key]=value"
    )
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
