"""The JSON of an answer, read with its types checked: whatever listens at the URL may be another server."""

from collections.abc import Mapping
from typing import Any


class Unreadable(ValueError):
    """The message goes on after the URL that was asked: "answers without ..." """


def object_of(answer: Any, what: str = "an answer") -> Mapping[str, Any]:
    if not isinstance(answer, dict):
        raise Unreadable(f"has {what} that is no JSON object")
    return answer


def text_of(raw: Mapping[str, Any], name: str) -> str:
    text = raw.get(name)
    if not isinstance(text, str):
        raise Unreadable(f"answers without a text `{name}`")
    return text


def items_of(raw: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    """A list of objects."""
    items = raw.get(name)
    if not isinstance(items, list):
        raise Unreadable(f"answers without a list `{name}`")
    return [object_of(item, f"an item of `{name}`") for item in items]


def rows_of(raw: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [dict(row) for row in items_of(raw, "data")]


def id_of(raw: Mapping[str, Any]) -> str:
    return text_of(raw, "id")


def optional_object(raw: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Empty if it is missing or null."""
    return object_of(raw.get(name) or {}, f"a `{name}`")
