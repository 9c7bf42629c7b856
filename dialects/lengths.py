"""Lengths first: the lists and objects of a body are counted before anything in them is inspected.

The limits are those that the body's JSON schema publishes, so every limit published there is enforced here.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from pydantic import BaseModel

MAX_UNKNOWN_FIELDS = 64  # per object: so many are inspected one by one, to be named or accepted

Location = tuple[int | str, ...]
Schema = Mapping[str, Any]


class Overlong(NamedTuple):
    """A list or object with `length` entries, more than `bound`."""

    location: Location
    length: int
    bound: int


class UnknownFields(NamedTuple):
    """An object with too many unknown fields; `location` is that of the first one."""

    location: Location


@dataclass(frozen=True, slots=True)
class ListBounds:
    max_items: int | None
    items: "Bounds | None"


@dataclass(frozen=True, slots=True)
class ObjectBounds:
    max_entries: int | None
    field_names: frozenset[str] | None  # None: any name is allowed
    by_field: Mapping[str, "Bounds"]
    entries: "Bounds | None"  # of the values under other names


@dataclass(frozen=True, slots=True)
class Bounds:
    """Limits for a value that is a list or an object, and for the values in it."""

    of_list: ListBounds | None
    of_object: ObjectBounds | None


def first_excess(value: object, model: type[BaseModel]) -> Overlong | UnknownFields | None:
    """The first place at which a parsed body exceeds the limits of `model`. Its depth has been checked before."""
    return _excess(value, _bounds_of_model(model), ())


def _excess(value: object, bounds: Bounds | None, location: Location) -> Overlong | UnknownFields | None:
    if bounds is None:
        return None
    if isinstance(value, list) and bounds.of_list is not None:
        return _excess_of_list(value, bounds.of_list, location)
    if isinstance(value, dict) and bounds.of_object is not None:
        return _excess_of_object(value, bounds.of_object, location)
    return None


def _excess_of_list(items: list[object], bounds: ListBounds, location: Location) -> Overlong | UnknownFields | None:
    if bounds.max_items is not None and len(items) > bounds.max_items:
        return Overlong(location, len(items), bounds.max_items)
    if bounds.items is None:
        return None
    found = (_excess(item, bounds.items, (*location, number)) for number, item in enumerate(items))
    return next((excess for excess in found if excess is not None), None)


def _excess_of_object(
    fields: dict[str, object], bounds: ObjectBounds, location: Location
) -> Overlong | UnknownFields | None:
    if bounds.max_entries is not None and len(fields) > bounds.max_entries:
        return Overlong(location, len(fields), bounds.max_entries)
    if bounds.field_names is not None and len(fields) > len(bounds.field_names) + MAX_UNKNOWN_FIELDS:
        return UnknownFields((*location, next(name for name in fields if name not in bounds.field_names)))
    found = (
        _excess(value, bounds.by_field.get(name, bounds.entries), (*location, name)) for name, value in fields.items()
    )
    return next((excess for excess in found if excess is not None), None)


@lru_cache
def _bounds_of_model(model: type[BaseModel]) -> Bounds | None:
    schema = model.model_json_schema()
    return _bounds_in(schema, schema.get("$defs", {}))


def _bounds_in(schema: object, definitions: Mapping[str, Schema]) -> Bounds | None:
    if not isinstance(schema, Mapping):
        return None  # true or absent: anything
    if "$ref" in schema:
        return _bounds_in(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    if branches := (schema.get("anyOf") or schema.get("oneOf")):
        return _widest(_bounds_in(branch, definitions) for branch in branches)
    if schema.get("type") == "array":
        return Bounds(ListBounds(schema.get("maxItems"), _bounds_in(schema.get("items"), definitions)), None)
    if schema.get("type") == "object":
        return Bounds(None, _bounds_of_object(schema, definitions))
    return None


def _bounds_of_object(schema: Schema, definitions: Mapping[str, Schema]) -> ObjectBounds:
    properties, others = schema.get("properties", {}), schema.get("additionalProperties", True)
    by_field = {name: _bounds_in(part, definitions) for name, part in properties.items()}
    return ObjectBounds(
        max_entries=schema.get("maxProperties"),
        field_names=frozenset(properties) if others is False else None,
        by_field={name: bounds for name, bounds in by_field.items() if bounds is not None},
        entries=_bounds_in(others, definitions),
    )


def _widest(branches: Iterable[Bounds | None]) -> Bounds | None:
    """The widest limits among several kinds of value: which kind a value is, is decided later."""
    known = [bounds for bounds in branches if bounds is not None]
    lists = [bounds.of_list for bounds in known if bounds.of_list is not None]
    objects = [bounds.of_object for bounds in known if bounds.of_object is not None]
    return Bounds(_widest_list(lists), _widest_object(objects)) if known else None


def _widest_list(lists: Sequence[ListBounds]) -> ListBounds | None:
    if len(lists) < 2:
        return lists[0] if lists else None
    return ListBounds(_largest([bounds.max_items for bounds in lists]), _widest(bounds.items for bounds in lists))


def _widest_object(objects: Sequence[ObjectBounds]) -> ObjectBounds | None:
    if len(objects) < 2:
        return objects[0] if objects else None
    fields = {name for bounds in objects for name in bounds.by_field}
    by_field = {name: _widest(bounds.by_field.get(name) for bounds in objects) for name in fields}
    known_names = [bounds.field_names for bounds in objects if bounds.field_names is not None]
    return ObjectBounds(
        max_entries=_largest([bounds.max_entries for bounds in objects]),
        field_names=frozenset().union(*known_names) if len(known_names) == len(objects) else None,
        by_field={name: bounds for name, bounds in by_field.items() if bounds is not None},
        entries=_widest(bounds.entries for bounds in objects),
    )


def _largest(bounds: Sequence[int | None]) -> int | None:
    """The largest limit; None if any of them is unlimited."""
    known = [bound for bound in bounds if bound is not None]
    return max(known) if len(known) == len(bounds) else None
