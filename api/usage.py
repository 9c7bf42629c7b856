"""/v1/usage and OpenAI's /v1/organization/usage: sums over the ledger. Of the own tenant; admins see all."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AwareDatetime, BeforeValidator, Field
from starlette.requests import Request
from starlette.responses import Response

from api.errors import json_response
from api.inputs import QueryModel, query_parameters, read_query
from api.services import caller_of, private_router
from dialects.openai_views import timestamp
from dialects.usage import (
    DAY_SECONDS,
    GROUPS,
    BucketPageView,
    UsageListView,
    as_csv,
    results_by_bucket,
    total_view,
    usage_views,
)
from domain.errors import InvalidCursor, InvalidRequest
from domain.jobs import JobKind
from storage import usage
from storage.usage import MAX_GROUPS, UsageQuery, UsageTotal

router = private_router("Usage")

DEFAULT_DAYS = 30

MAX_DAYS = 400

MAX_NAMES = 32  # of one filter

EARLIEST, LATEST = datetime(1980, 1, 1, tzinfo=UTC), datetime(2999, 1, 1, tzinfo=UTC)

Name = Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[^\u0000]*$")]


def _read_time(value: object) -> object:
    """A date alone is its beginning in UTC. Numbers are refused, which pydantic would take for seconds since 1970."""
    if not isinstance(value, str) or value[4:5] != "-":
        raise ValueError(f"it is {str(value)[:40]!r}; write it as 2026-10-20 or 2026-10-20T12:00:00Z")
    return f"{value}T00:00:00Z" if len(value) == len("2026-10-20") else value


def _in_range(at: datetime) -> datetime:
    if not EARLIEST <= at <= LATEST:
        raise ValueError(f"it is {at.isoformat()}; it must be from {EARLIEST.year} to {LATEST.year}")
    return at


Time = Annotated[AwareDatetime, BeforeValidator(_read_time), AfterValidator(_in_range)]


class UsageParameters(QueryModel):
    start: Time | None = Field(default=None, description="From when on; a date or a time. Default: 30 days ago.")
    end: Time | None = Field(default=None, description="Until when, exclusively. Default: now.")
    group_by: str = Field(default="", max_length=64, description="Any of key, tenant, model, day, with commas.")
    model: str | None = Field(default=None, max_length=128, pattern=r"^[^\u0000]*$", description="Only this model's.")
    key: str | None = Field(default=None, max_length=64, pattern=r"^[^\u0000]*$", description="Only this key's, by id.")
    tenant: str | None = Field(
        default=None, max_length=256, pattern=r"^[^\u0000]*$", description="Only this tenant's, by name."
    )
    format: Literal["json", "csv"] | None = Field(
        default=None, description="Takes precedence over `Accept: text/csv`. Default: json."
    )


@router.get(
    "/v1/usage",
    responses={200: {"model": UsageListView, "content": {"text/csv": {"schema": {"type": "string"}}}}},
    openapi_extra={"parameters": query_parameters(UsageParameters)},
)
async def read_usage(request: Request) -> Response:
    """What was used between two times: tokens, seconds and their cost, by key, tenant, model or day. An attempt counts
    when it ended."""
    services, _ = caller_of(request)
    query = read_query(request, UsageParameters)
    groups = _groups(query.group_by)
    end = query.end or datetime.now(UTC)
    start = query.start or end - timedelta(days=DEFAULT_DAYS)
    _refuse_range(start, end)
    asked = _asked(
        request,
        start=start,
        end=end,
        by_tenant="tenant" in groups,
        by_key="key" in groups,
        bucket_seconds=DAY_SECONDS if "day" in groups else 0,
        models=[query.model] if query.model is not None else [],
        key_ids=[query.key] if query.key is not None else [],
        tenants=[query.tenant] if query.tenant is not None else [],
    )
    entries = {entry.id: entry for entry in services.catalog.entries}
    views = usage_views(await _totals(request, asked), entries, groups)
    currency = services.settings.currency
    headers = {"vary": "accept"}
    if query.format == "csv" or (query.format is None and "text/csv" in request.headers.get("accept", "")):
        return Response(as_csv(views, groups, currency), headers=headers, media_type="text/csv")
    answer = {"object": "usage", "start": timestamp(start), "end": timestamp(end), "currency": currency}
    return json_response({**answer, "data": views, "total": total_view(views)}, headers=headers)


def _groups(text: str) -> list[str]:
    names = {name.strip() for name in text.split(",") if name.strip()}
    if unknown := sorted(names - set(GROUPS)):
        raise InvalidRequest(
            f"group_by has {unknown[0][:64]!r}; it may have: {', '.join(sorted(GROUPS))}", param="group_by"
        )
    return [name for name in GROUPS if name in names]


def _refuse_range(start: datetime, end: datetime) -> None:
    if not start < end:
        raise InvalidRequest(
            f"start is {timestamp(start)} and end is {timestamp(end)}; start must be earlier", param="start"
        )
    if end - start > timedelta(days=MAX_DAYS):
        raise InvalidRequest(
            f"start is {timestamp(start)}, {(end - start).days} days before end; ask for at most {MAX_DAYS} days",
            param="start",
        )


def _asked(request: Request, **fields: Any) -> UsageQuery:
    """Everybody's for an admin, else the caller's own."""
    state = request.state
    return UsageQuery(tenant_id=None if state.is_admin else state.tenant_id, **fields)


async def _totals(request: Request, asked: UsageQuery) -> Sequence[UsageTotal]:
    services, _ = caller_of(request)
    write = services.write if asked.tenant_id else services.system_write
    totals = await write(usage.totals, asked)  # only reads, but its time limit needs a transaction
    if len(totals) > MAX_GROUPS:
        raise InvalidRequest(
            f"there are more than {MAX_GROUPS} groups; ask for a shorter time, or group by less", param="group_by"
        )
    return totals


# OpenAI's

Width = Literal["1m", "1h", "1d"]

SECONDS_BY_WIDTH: dict[Width, int] = {"1m": 60, "1h": 3_600, "1d": DAY_SECONDS}

LIMITS_BY_WIDTH: dict[Width, tuple[int, int]] = {"1m": (60, 1440), "1h": (24, 168), "1d": (7, 31)}  # default, largest

MAX_TIME = 32_503_680_000  # the year 3000

Names = Annotated[list[Name], Field(max_length=MAX_NAMES)]


class BucketParameters(QueryModel):
    start_time: int = Field(ge=0, le=MAX_TIME, description="Seconds since 1970, inclusive.")
    end_time: int | None = Field(default=None, ge=0, le=MAX_TIME, description="Exclusive. Default: now.")
    bucket_width: Width = "1d"
    limit: int | None = Field(default=None, ge=1, le=1440, description="How many buckets.")
    page: str | None = Field(default=None, max_length=32, description="The next_page of the previous page.")
    models: list[Name] = Field(default=[], max_length=MAX_NAMES, description="Without adapters.")
    api_key_ids: list[Name] = Field(default=[], max_length=MAX_NAMES)
    project_ids: list[Name] = Field(default=[], max_length=MAX_NAMES, description="Names of tenants.")
    user_ids: list[Name] = Field(default=[], max_length=MAX_NAMES, description="Jobs have no users; none is found.")


class EmbeddingsUsageParameters(BucketParameters):
    group_by: list[Literal["project_id", "user_id", "api_key_id", "model"]] = Field(default=[], max_length=MAX_NAMES)


class CompletionsUsageParameters(BucketParameters):
    group_by: list[Literal["project_id", "user_id", "api_key_id", "model", "batch", "service_tier", "api_source"]] = (
        Field(default=[], max_length=MAX_NAMES)
    )
    batch: bool | None = Field(default=None, description="Only batches, or none.")


@router.get(
    "/v1/organization/usage/completions",
    responses={200: {"model": BucketPageView}},
    openapi_extra={"parameters": query_parameters(CompletionsUsageParameters)},
)
async def read_completions_usage(request: Request) -> Response:
    """OpenAI's usage of completions: every job that generates text, by minutes, hours or days."""
    query = read_query(request, CompletionsUsageParameters)
    return await _buckets(request, query, JobKind.GENERATION, frozenset[str](query.group_by), is_batch=query.batch)


@router.get(
    "/v1/organization/usage/embeddings",
    responses={200: {"model": BucketPageView}},
    openapi_extra={"parameters": query_parameters(EmbeddingsUsageParameters)},
)
async def read_embeddings_usage(request: Request) -> Response:
    """OpenAI's usage of embeddings, by minutes, hours or days."""
    query = read_query(request, EmbeddingsUsageParameters)
    return await _buckets(request, query, JobKind.EMBEDDING, frozenset[str](query.group_by), is_batch=None)


async def _buckets(
    request: Request, query: BucketParameters, kind: JobKind, groups: frozenset[str], *, is_batch: bool | None
) -> Response:
    width = SECONDS_BY_WIDTH[query.bucket_width]
    limit = _limit(query)
    if query.end_time is not None and not query.start_time < query.end_time:
        raise InvalidRequest(
            f"start_time is {query.start_time} and end_time is {query.end_time}; start_time must be earlier",
            param="start_time",
        )
    end_time = min(query.end_time or MAX_TIME, int(datetime.now(UTC).timestamp()) + 1)
    first = query.start_time if query.page is None else _parse_page(query.page)
    aligned = first - first % width
    has_begun = max(first, query.start_time) < end_time
    starts = list(range(aligned, min(end_time, aligned + limit * width), width)) if has_begun else []
    results: dict[int, list[dict[str, Any]]] = {}
    if starts and not query.user_ids:
        asked = _asked(
            request,
            start=datetime.fromtimestamp(max(aligned, query.start_time), UTC),
            end=datetime.fromtimestamp(min(starts[-1] + width, end_time), UTC),
            by_tenant="project_id" in groups,
            by_key="api_key_id" in groups,
            by_batch="batch" in groups,
            bucket_seconds=width,
            kinds=[kind],
            models=query.models,
            key_ids=query.api_key_ids,
            tenants=query.project_ids,
            is_batch=is_batch,
        )
        results = results_by_bucket(await _totals(request, asked), kind, by_model="model" in groups)
    next_start = aligned + limit * width
    has_more = bool(starts) and next_start < end_time
    data = [
        {"object": "bucket", "start_time": at, "end_time": min(at + width, end_time), "results": results.get(at, [])}
        for at in starts
    ]
    next_page = f"page_{next_start}" if has_more else None
    return json_response({"object": "page", "data": data, "has_more": has_more, "next_page": next_page})


def _limit(query: BucketParameters) -> int:
    default, largest = LIMITS_BY_WIDTH[query.bucket_width]
    if query.limit is not None and query.limit > largest:
        raise InvalidRequest(
            f"limit is {query.limit}; with bucket_width={query.bucket_width} it must be at most {largest}",
            param="limit",
        )
    return query.limit or default


def _parse_page(page: str) -> int:
    prefix, _, number = page.partition("_")
    if prefix != "page" or not number.isascii() or not number.isdigit() or int(number) > MAX_TIME:
        raise InvalidCursor(f"page is {page[:40]!r}; send the next_page of the previous page", param="page")
    return int(number)
