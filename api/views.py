"""What all views are, and the pages in which every list is answered."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class View(BaseModel):
    """The published schema of an answer, which is built as a plain dict."""

    model_config = ConfigDict(extra="forbid")


class DeletedView(View):
    id: str
    object: str
    deleted: bool


class PageView(View):
    """Subclasses have the `data`."""

    object: Literal["list"]
    first_id: str | None
    last_id: str | None
    has_more: bool


def page(data: Sequence[Mapping[str, Any]], limit: int) -> dict[str, Any]:
    """As `PageView` says. `data` may hold more than `limit`, which says that there is more."""
    shown = data[:limit]
    return {
        "object": "list",
        "data": shown,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
        "has_more": len(data) > limit,
    }


def timestamp(at: datetime | None) -> str | None:
    """UTC to the millisecond, as 2026-10-20T12:00:00.000Z."""
    if at is None:
        return None
    return at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
