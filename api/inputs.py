"""Reading requests: JSON bodies, query strings with pagination, and the headers of the job routes.

Unknown fields and invalid values are refused, with the field, the value seen and the remedy. Parsing takes linear time,
and much less for a refused request: lengths are checked first, and only the first error is reported. Large bodies are
parsed off the event loop.
"""

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, ParamSpec, TypeVar, get_args, get_origin
from uuid import UUID

from pydantic import AfterValidator, AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from starlette.requests import Request
from starlette.responses import Response

from api.errors import RequestTimeout, UnsupportedMediaType, json_response
from api.known_bodies import Key, ReadBody, Translated
from api.limits import LARGE_BYTES
from api.middleware import ARRIVED
from api.request_headers import header_of
from api.services import caller_of, services_of
from dialects.bodies import Model, invalid_request, parse_model
from dialects.fields import HintTree, ignored_fields_context, note_ignored
from dialects.native import NO_NUL, IdempotencyKey, JobOptionFields, MetadataKey, MetadataValue
from dialects.openai_views import REFERENCE, View, page
from domain.catalog import Task
from domain.errors import InvalidCursor, InvalidRequest
from domain.jobs import FirstErrorModel, JobStatus, external_id, parse_id, parse_id_of_other
from text.models import ModelView

BODY_SECONDS = 30.0  # how long the whole body may take to arrive

P = ParamSpec("P")

WorkResult = TypeVar("WorkResult")


async def read_model(request: Request, model: type[Model], hints: HintTree | None = None) -> Model:
    """The body, validated as `model`; unknown fields that `hints` lists are dropped. The middleware has bounded its
    size. Raises InvalidRequest, UnsupportedMediaType, RequestTimeout or ServerOverloaded."""
    require_json(request)
    return await off_loop(request, parse_model, await read_body(request), model, hints)


async def read_for_model(
    request: Request, model: type[Model], hints: HintTree | None = None, *, task: Task = "generation"
) -> Model:
    """Like `read_model`, for a body with a `model`, which is by default the installation's for the task."""
    require_json(request)
    default_model = services_of(request).catalog.default_id_for(task)
    return await off_loop(request, parse_model, await read_body(request), model, hints, default_model=default_model)


async def read_generation(
    request: Request,
    content: bytes,
    model: type[Model],
    translate: Callable[[Model, ModelView], Translated],
    hints: HintTree | None = None,
    *,
    has_default: bool = True,
) -> ReadBody[Model, Translated]:
    """The body `content` of a request for generations, as `translate` makes them of it. A body without a `model` gets
    the installation's, if the route `has_default`. Raises what `parse_model` and `translate` do, ModelNotFound,
    ModelUnavailable and ServerOverloaded."""
    known, key = known_body(request, content, model, has_default=has_default)
    if known is not None:
        return known
    services, tenant_id = caller_of(request)
    body: Any = await off_loop(request, parse_model, content, model, hints, default_model=key.default_model)
    view = services.views.get(body.model)
    generation = await off_loop(request, translate, body, view)
    return ReadBody(tenant_id, key, body, generation, view, noted_fields())


def known_body(
    request: Request, content: bytes, model: type[Model], *, has_default: bool = True
) -> tuple[ReadBody[Model, Any] | None, Key]:
    """The body as it was read before, if that is known and still what it means; and its key."""
    services, tenant_id = caller_of(request)
    key = Key(model, services.catalog.default_id_for("generation") if has_default else None, content)
    known = services.known_bodies.find(tenant_id, key)
    if known is None or known.view is not services.views.get(known.body.model):
        return None, key
    note_ignored(known.ignored)
    return known, key


def noted_fields() -> tuple[str, ...]:
    """The fields of the body that were ignored so far."""
    return tuple(ignored_fields_context.get() or ())


async def off_loop(
    request: Request, function: Callable[P, WorkResult], *args: P.args, **kwargs: P.kwargs
) -> WorkResult:
    """Call a function whose running time grows with the size of the body: in a thread if the body is large. The body
    has been read already. Raises what `function` raises, and ServerOverloaded."""
    large_work = services_of(request).large_work
    return await large_work.run(len(await request.body()), function, *args, **kwargs)


async def read_body(request: Request) -> bytes:
    """The whole body. Raises RequestTimeout if it takes longer than BODY_SECONDS, and ServerOverloaded if too many
    large ones of this tenant are arriving."""
    announced = header_of(request.scope, b"content-length") or ""
    if announced.isdigit() and int(announced) <= LARGE_BYTES:
        return await _whole_body(request)
    places = services_of(request).large_bodies
    places.refuse_if_full()
    with places.hold():
        return await _whole_body(request)


async def _whole_body(request: Request) -> bytes:
    arrived = request.scope.get("extensions", {}).get(ARRIVED)
    if arrived is not None and arrived["has"]():
        return await request.body()  # without a timer
    try:
        async with asyncio.timeout(BODY_SECONDS):
            return await request.body()
    except TimeoutError:
        raise RequestTimeout(f"the body did not arrive within {BODY_SECONDS:.0f} s; send it without pauses") from None


def require_json(request: Request) -> None:
    content_type = (header_of(request.scope, b"content-type") or "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        seen = f"Content-Type is {content_type[:64]!r}" if content_type else "Content-Type is missing"
        raise UnsupportedMediaType(f"{seen}; send JSON as application/json")
    encoding = (header_of(request.scope, b"content-encoding") or "identity").lower()
    if encoding != "identity":
        raise UnsupportedMediaType(f"Content-Encoding is {encoding[:32]!r}; send the body uncompressed")


Query = TypeVar("Query", bound="QueryModel")

Listed = TypeVar("Listed")

MAX_PARAMETERS = 64  # more than twice what any route accepts, each entry of a mapping counted


class QueryModel(FirstErrorModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def lists(cls) -> set[str]:
        """The names of the parameters that may be repeated."""
        return {
            name
            for name, field in cls.model_fields.items()
            if any(map(_is_list, (field.annotation, *get_args(field.annotation))))
        }


class PageQuery(QueryModel):
    after: str | None = Field(default=None, description="The last_id of the previous page.")
    limit: int = Field(default=20, ge=1, le=100)

    def cursor(self, prefix: str | None = None) -> UUID | None:
        """`after`, parsed: a job's id or, with `prefix`, the id of another kind of object. Raises InvalidCursor."""
        if self.after is None:
            return None
        try:
            return parse_id(self.after) if prefix is None else parse_id_of_other(self.after, prefix)
        except ValueError as exc:
            raise InvalidCursor(f"after: {exc}; send the last_id of the previous page", param="after") from None

    def items_after(self, items: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
        """The part of a complete list that follows `after`. Raises InvalidCursor."""
        ids = [item["id"] for item in items]
        if self.after is not None and self.after not in ids:
            raise InvalidCursor(
                f"after is {self.after[:64]!r}, which is not in this list; send the last_id of a page", param="after"
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
    """The page of the caller's objects that `query` asks for. `reader(session, tenant_id, after=, limit=, **filters)`
    finds them, `view` makes each the JSON object of the answer. `prefix` is that of their ids; None means jobs. Raises
    InvalidCursor."""
    services, tenant_id = caller_of(request)
    after = query.cursor(prefix)
    found = await services.read(reader, tenant_id, after=after, limit=query.limit + 1, **filters)
    return json_response(page([view(one) for one in found], query.limit))


def listing(view: type[View], query: type[PageQuery]) -> dict[str, Any]:
    """The keyword arguments that declare a list route in the OpenAPI document: its answer and its query parameters."""
    return {"responses": {200: {"model": view}}, "openapi_extra": {"parameters": query_parameters(query)}}


def _is_list(annotation: object) -> bool:
    return get_origin(annotation) is list


def read_query(request: Request, model: type[Query]) -> Query:
    """The query string, validated as `model`. `a[k]=v` is the entry `k` of the mapping `a`; `a`, `a[]` and `a[0]` are
    items of the list `a`. Raises InvalidRequest, also for unknown or repeated names."""
    parameters = request.query_params.multi_items()
    if len(parameters) > MAX_PARAMETERS:
        raise InvalidRequest(f"the query string has {len(parameters)} parameters; send at most {MAX_PARAMETERS}")
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
    """The OpenAPI parameter objects of `model`."""
    whole = model.model_json_schema(ref_template=REFERENCE)
    defs = {"$defs": whole["$defs"]} if "$defs" in whole else {}
    return [
        {"name": name, "in": "query", "required": False, "schema": schema | defs, **_style(schema)}
        for name, schema in whole["properties"].items()
    ]


def _style(schema: Mapping[str, object]) -> dict[str, object]:
    return {"style": "deepObject", "explode": True} if schema.get("type") == "object" else {}


MAX_WAIT_SECONDS = 60  # of one long poll

_WAIT = re.compile(r"(?:^|[,;\s])wait\s*=\s*\"?(\d{1,9})\"?", re.IGNORECASE)


def _refuse_number(value: object) -> object:
    """Refuse numbers, which pydantic would take for seconds since 1970. Raises ValueError."""
    if isinstance(value, str) and not value[4:5] == "-":
        raise ValueError(f"it is {value[:40]!r}; write it as 2026-10-20T12:00:00Z")
    return value


class WaitQuery(QueryModel):
    wait: int = Field(default=0, ge=0, le=MAX_WAIT_SECONDS, description="How many seconds to wait for the job to end.")
    include: str = Field(
        default="", description="Any of input, output, attempts. The output of a running job is partial."
    )


class EventsQuery(QueryModel):
    starting_after: int | None = Field(default=None, description="The last sequence number received.")
    from_: Literal["start", "snapshot", "now"] = Field(
        default="start", alias="from", description="Where to begin if no cursor is sent."
    )
    include: str = Field(default="", description="token_ids adds the token ids of each delta.")
    token: str | None = Field(default=None, description="A stream token, in place of a key.")


def _whole_batch_id(value: str) -> str:
    """Raises ValueError."""
    return external_id(parse_id_of_other(value, "batch"), "batch")


class ListQuery(PageQuery):
    status: JobStatus | None = None
    model: str | None = Field(default=None, max_length=128, pattern=NO_NUL)
    created_after: Annotated[AwareDatetime | None, BeforeValidator(_refuse_number)] = None
    metadata: dict[MetadataKey, MetadataValue] = Field(
        default_factory=dict, max_length=16, description="metadata[key]=value"
    )
    idempotency_key: IdempotencyKey | None = Field(default=None, description="The job that was submitted with it.")
    batch: Annotated[str, AfterValidator(_whole_batch_id)] | None = Field(
        default=None, description="The id of a batch: the jobs of its lines."
    )
    order: Literal["asc", "desc"] = "desc"


class OutputQuery(QueryModel):
    index: int = Field(default=0, ge=0, le=1_000, description="Which of the n choices to return as text.")


def idempotency_key(request: Request, body: JobOptionFields) -> str | None:
    """From the header or the body. Raises InvalidRequest if it is malformed, or if the two differ."""
    header = parse_idempotency_key(header_of(request.scope, b"idempotency-key"))
    if header is None:
        return body.idempotency_key
    if body.idempotency_key is not None and body.idempotency_key != header:
        raise InvalidRequest(
            "the Idempotency-Key header and idempotency_key differ; send only one of them", param="idempotency_key"
        )
    return header


def parse_idempotency_key(header: str | None) -> str | None:
    """The header's value, checked. Raises InvalidRequest."""
    if header is None:
        return None
    if not 1 <= len(header) <= 255 or not header.isascii() or not header.isprintable() or " " in header:
        raise InvalidRequest(
            f"Idempotency-Key has {len(header)} characters; send 1 to 255 printable ASCII characters without spaces",
            param="idempotency_key",
        )
    return header


def preferred_wait(prefer: str | None) -> int | None:
    """The seconds of `Prefer: wait=N` (RFC 7240), at most MAX_WAIT_SECONDS; None if there is no such preference or it
    cannot be parsed, which RFC 7240 says to ignore."""
    match = _WAIT.search(prefer or "")
    return min(int(match[1]), MAX_WAIT_SECONDS) if match else None


def included(include: str, known: set[str]) -> set[str]:
    """The names in a comma-separated `include`. Raises InvalidRequest for one that is not in `known`."""
    names = {name.strip() for name in include.split(",") if name.strip()}
    if unknown := names - known:
        raise InvalidRequest(
            f"include has {sorted(unknown)[0][:64]!r}; it may have: {', '.join(sorted(known))}", param="include"
        )
    return names


def stream_cursor(last_event_id: str | None, starting_after: int | None) -> int | None:
    """The header takes precedence: a browser that reconnects repeats its first URL, so the header is newer. Raises
    InvalidCursor."""
    if last_event_id is None or not last_event_id.strip():
        return starting_after
    if not last_event_id.isascii() or not last_event_id.isdigit() or len(last_event_id) > 18:
        raise InvalidCursor(
            f"Last-Event-ID is {last_event_id[:40]!r}; send the id of the last event that you received",
            param="Last-Event-ID",
        )
    return int(last_event_id)


def accepts_json(accept: str) -> bool:
    """Whether the Accept header names application/json before any plain text or wildcard type."""
    kinds = [kind.partition(";")[0].strip().lower() for kind in accept.split(",")]
    wanted = [kind for kind in kinds if kind in ("application/json", "text/plain", "text/*", "*/*")]
    return bool(wanted) and wanted[0] == "application/json"
