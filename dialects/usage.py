"""What clients are told of the ledger: our groups with their cost, as JSON or CSV, and OpenAI's buckets."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field

from dialects.openai_views import View
from domain.catalog import ModelEntry
from domain.jobs import JobKind
from domain.model_names import model_name
from storage.usage import UsageTotal

DAY_SECONDS = 86_400


class UsageGroupView(View):
    """One group. The fields that it is not grouped by are missing."""

    day: NotRequired[Annotated[str, Field(description="In UTC, such as 2026-11-29.")]]
    tenant: NotRequired[str]
    key: NotRequired[
        Annotated[str | None, Field(description="The key's id; null for jobs that were sent without one.")]
    ]
    model: NotRequired[str]
    num_jobs: Annotated[int, Field(description="Jobs that have ended, however they did.")]
    num_attempts: Annotated[int, Field(description="Including those that died.")]
    prompt_tokens: int
    cached_tokens: Annotated[int, Field(description="Of the prompt tokens, those found in the prefix cache.")]
    output_tokens: int
    reasoning_tokens: Annotated[int, Field(description="Of the output tokens, those up to </think>.")]
    queue_seconds: float
    prefill_seconds: Annotated[float, Field(description="From the claim to the first committed output.")]
    decode_seconds: float
    engine_seconds: Annotated[float, Field(description="Each step's time, divided by the sequences in it.")]
    cost: Annotated[str | None, Field(description="A decimal number; null if no model of the group has a price.")]


class UsageListView(View):
    object: Literal["usage"]
    start: str
    end: str
    currency: str
    data: list[UsageGroupView]
    total: UsageGroupView


#: The names of `group_by`, in the order in which they are shown.
GROUPS = ("day", "tenant", "key", "model")

_COUNTS = ("num_jobs", "num_attempts", "prompt_tokens", "cached_tokens", "output_tokens", "reasoning_tokens")
_SECONDS = ("queue_seconds", "prefill_seconds", "decode_seconds", "engine_seconds")
_FIRST_FIGURE = 6  # of the fields of UsageTotal


@dataclass(slots=True)
class _Sum:
    figures: list[float]
    cost: Decimal | None = None


def usage_views(
    totals: Iterable[UsageTotal], entries: Mapping[str, ModelEntry], group_by: Sequence[str]
) -> list[UsageGroupView]:
    """One view per group, in order. `entries` are the models that have prices now."""
    sums: dict[tuple[str | None, ...], _Sum] = {}
    for total in totals:
        names = {
            "day": None if total.bucket is None else f"{datetime.fromtimestamp(total.bucket, UTC):%Y-%m-%d}",
            "tenant": total.tenant,
            "key": total.key_id,
            "model": model_name(total.model, total.adapter),
        }
        group = sums.setdefault(tuple(names[name] for name in group_by), _Sum([0] * len(_COUNTS + _SECONDS)))
        group.figures = [a + b for a, b in zip(group.figures, astuple(total)[_FIRST_FIGURE:], strict=True)]
        cost = _cost_of(total, entries)
        group.cost = group.cost if cost is None else (group.cost or Decimal()) + cost
    return [_view(dict(zip(group_by, names, strict=True)), group) for names, group in sums.items()]


def _cost_of(total: UsageTotal, entries: Mapping[str, ModelEntry]) -> Decimal | None:
    entry = entries.get(total.model)
    return (
        None
        if entry is None
        else entry.cost_of(
            prompt_tokens=total.num_prompt_tokens,
            cached_tokens=total.num_cached_tokens,
            output_tokens=total.num_output_tokens,
        )
    )


def _view(names: Mapping[str, str | None], group: _Sum) -> UsageGroupView:
    view: dict[str, Any] = {name: names[name] for name in GROUPS if name in names}
    for name, figure in zip(_COUNTS + _SECONDS, group.figures, strict=True):
        view[name] = int(figure) if name in _COUNTS else round(figure, 3)
    return {**view, "cost": None if group.cost is None else f"{group.cost:f}"}  # type: ignore[typeddict-item]


def total_view(views: Sequence[UsageGroupView]) -> UsageGroupView:
    """The sum of all groups."""
    costs = [Decimal(view["cost"]) for view in views if view["cost"] is not None]
    figures: list[float] = [sum(view[name] for view in views) for name in _COUNTS + _SECONDS]  # type: ignore[literal-required]
    return _view({}, _Sum(figures, sum(costs, Decimal()) if costs else None))


def as_csv(views: Sequence[UsageGroupView], group_by: Sequence[str], currency: str) -> str:
    """One line per group under a line of names. Names that a spreadsheet would take for a formula are quoted for it."""
    columns = [name for name in GROUPS if name in group_by] + [*_COUNTS, *_SECONDS, "cost"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\r\n")
    writer.writerow([*columns, "currency"])
    for view in views:
        cells = ["" if view.get(name) is None else str(view[name]) for name in columns]  # type: ignore[literal-required]
        writer.writerow([*(f"'{cell}" if cell[:1] in ("=", "+", "@", "\t") else cell for cell in cells), currency])
    return text.getvalue()


# OpenAI's


class CompletionsUsageView(View):
    object: Literal["organization.usage.completions.result"]
    input_tokens: int
    input_cached_tokens: int
    input_uncached_tokens: int
    output_tokens: int
    input_text_tokens: int
    input_cached_text_tokens: int
    output_text_tokens: int
    input_audio_tokens: Literal[0]
    input_cached_audio_tokens: Literal[0]
    output_audio_tokens: Literal[0]
    input_image_tokens: Literal[0]
    input_cached_image_tokens: Literal[0]
    output_image_tokens: Literal[0]
    input_cache_write_tokens: Literal[0]
    num_model_requests: int
    project_id: Annotated[str | None, Field(description="With group_by=project_id: the tenant's name.")]
    user_id: None
    api_key_id: Annotated[str | None, Field(description="With group_by=api_key_id.")]
    model: Annotated[str | None, Field(description="With group_by=model.")]
    batch: Annotated[bool | None, Field(description="With group_by=batch.")]
    service_tier: None
    api_source: None


class EmbeddingsUsageView(View):
    object: Literal["organization.usage.embeddings.result"]
    input_tokens: int
    num_model_requests: int
    project_id: Annotated[str | None, Field(description="With group_by=project_id: the tenant's name.")]
    user_id: None
    api_key_id: Annotated[str | None, Field(description="With group_by=api_key_id.")]
    model: Annotated[str | None, Field(description="With group_by=model.")]


class BucketView(View):
    object: Literal["bucket"]
    start_time: int
    end_time: int
    results: list[CompletionsUsageView | EmbeddingsUsageView]


class BucketPageView(View):
    object: Literal["page"]
    data: list[BucketView]
    has_more: bool
    next_page: str | None


def results_by_bucket(
    totals: Iterable[UsageTotal], kind: JobKind, *, by_model: bool
) -> dict[int, list[dict[str, Any]]]:
    """OpenAI's results by the start of their bucket."""
    results: dict[int, dict[tuple[Any, ...], dict[str, Any]]] = {}
    for total in totals:
        assert total.bucket is not None
        model = model_name(total.model, total.adapter) if by_model else None
        own = results.setdefault(total.bucket, {})
        key = (total.tenant, total.key_id, total.is_batch, model)
        result = own.setdefault(key, _empty_result(kind, total, model))
        result["input_tokens"] += total.num_prompt_tokens
        result["num_model_requests"] += total.num_jobs
        if kind is JobKind.GENERATION:
            _add(result, total)
    return {bucket: list(own.values()) for bucket, own in results.items()}


def _add(result: dict[str, Any], total: UsageTotal) -> None:
    """The tokens of completions, which are all of text."""
    for name, number in (
        ("input_text_tokens", total.num_prompt_tokens),
        ("input_cached_tokens", total.num_cached_tokens),
        ("input_cached_text_tokens", total.num_cached_tokens),
        ("input_uncached_tokens", total.num_prompt_tokens - total.num_cached_tokens),
        ("output_tokens", total.num_output_tokens),
        ("output_text_tokens", total.num_output_tokens),
    ):
        result[name] += number


def _empty_result(kind: JobKind, total: UsageTotal, model: str | None) -> dict[str, Any]:
    name = "completions" if kind is JobKind.GENERATION else "embeddings"
    result: dict[str, Any] = {"object": f"organization.usage.{name}.result", "input_tokens": 0, "num_model_requests": 0}
    result |= {"project_id": total.tenant, "user_id": None, "api_key_id": total.key_id, "model": model}
    if kind is JobKind.EMBEDDING:
        return result
    zeros = {name: 0 for name in CompletionsUsageView.__annotations__ if name.endswith("_tokens")}
    return result | zeros | {"batch": total.is_batch, "service_tier": None, "api_source": None}
