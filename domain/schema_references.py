"""`$ref` within a schema: where it points, and a form of the schema in which each points to a definition of its own.

A generator may point anywhere, as `#/properties/from` does. What changes the shape of a schema would break such a
pointer, so each target becomes a definition first.
"""

from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

from domain.schema_keywords import JsonSchema, children_of, list_of, with_children

DEFINITIONS = "#/$defs/"
MAX_PLACE_CHARS = 200


def check_references(schema: JsonSchema) -> None:
    """Raises ValueError for a reference to nothing, and for one that leads back to itself without any progress."""
    checked: set[str] = set()
    for subschema, place in walk(schema):
        reference = local_reference(subschema)
        if reference is None:
            continue
        if not _leads_somewhere(schema, reference):
            raise ValueError(f"$ref at {place} is {reference[:64]!r}, and there is nothing at that place; correct it")
        if reference not in checked:
            _check_progress(schema, reference, checked)


def _schemas_in(schema: Any) -> Iterator[JsonSchema]:
    return (found for found, _ in walk(schema))


def walk(schema: Any) -> Iterator[tuple[JsonSchema, str]]:
    """The schema and all schemas in it, each with its place as a JSON pointer."""
    waiting: list[tuple[Any, str]] = [(schema, "#")]
    while waiting:
        found, place = waiting.pop()
        if isinstance(found, dict):
            yield found, place
            waiting += [(child, f"{place}/{path}"[:MAX_PLACE_CHARS]) for child, path in children_of(found)]


def local_reference(schema: JsonSchema) -> str | None:
    """The JSON pointer that `$ref` is, None where it is none or points elsewhere."""
    reference = schema.get("$ref")
    is_local = isinstance(reference, str) and (reference == "#" or reference.startswith("#/"))
    return reference if is_local else None


def gather(schema: JsonSchema) -> JsonSchema:
    """The same schema; each local reference is `#/$defs/N`, and all definitions are used. `check_references` passed."""
    targets: set[tuple[str, ...]] = set()
    waiting: list[Any] = [schema]
    while waiting:  # what is pointed to may lie under a keyword of no schema, and point on
        for found in _schemas_in(waiting.pop()):
            reference = local_reference(found)
            if reference is not None and (steps := _steps(reference)) not in targets:
                targets.add(steps)
                waiting.append(_resolve(schema, steps))
    numbers = {steps: number for number, steps in enumerate(sorted(targets))}

    def rebuilt(found: Any, steps: tuple[str, ...], *, is_definition: bool) -> Any:
        if not isinstance(found, dict):
            return found
        if steps in numbers and not is_definition:
            return {"$ref": f"{DEFINITIONS}{numbers[steps]}"}
        bare = {keyword: value for keyword, value in found.items() if keyword not in ("$defs", "definitions")}
        reference = local_reference(found)
        if reference is not None:
            bare["$ref"] = f"{DEFINITIONS}{numbers[_steps(reference)]}"
        return with_children(bare, lambda child, path: rebuilt(child, steps + _steps(f"#/{path}"), is_definition=False))

    whole: JsonSchema = rebuilt(schema, (), is_definition=False)
    definitions = {
        str(number): rebuilt(_resolve(schema, steps), steps, is_definition=True) for steps, number in numbers.items()
    }
    return whole | ({"$defs": definitions} if definitions else {})


def _check_progress(schema: JsonSchema, reference: str, checked: set[str]) -> None:
    """Follow `$ref` and `allOf` only: whoever has to satisfy a schema has to satisfy these at the same place."""
    path: dict[str, Iterator[str]] = {reference: _at_the_same_place(schema, reference)}
    while path:
        pointer, following = next(reversed(path.items()))
        followed = next(following, None)
        if followed is None:
            del path[pointer]
            checked.add(pointer)
        elif followed in path:
            raise ValueError(
                f"$ref to {followed[:64]!r} leads back to itself without anything between; "
                "put the reference into properties, items or a branch of anyOf"
            )
        elif followed not in checked:
            path[followed] = _at_the_same_place(schema, followed)


def _at_the_same_place(schema: JsonSchema, reference: str) -> Iterator[str]:
    """Nothing where the reference leads nowhere: that is found where it stands."""
    waiting: list[Any] = [_resolve(schema, _steps(reference))] if _leads_somewhere(schema, reference) else []
    while waiting:
        found = waiting.pop()
        if isinstance(found, dict):
            following = local_reference(found)
            if following is not None:
                yield following
            waiting += list_of(found, "allOf")


def _leads_somewhere(schema: JsonSchema, reference: str) -> bool:
    try:
        return isinstance(_resolve(schema, _steps(reference)), dict | bool)
    except LookupError:
        return False


def _steps(reference: str) -> tuple[str, ...]:
    """RFC 6901."""
    return tuple(unquote(step).replace("~1", "/").replace("~0", "~") for step in reference.split("/")[1:])


def _resolve(schema: JsonSchema, steps: tuple[str, ...]) -> Any:
    found: Any = schema
    for step in steps:
        if isinstance(found, list):
            if not step.isdecimal() or int(step) >= len(found):
                raise LookupError(step)
            found = found[int(step)]
        elif isinstance(found, dict):
            found = found[step]
        else:
            raise LookupError(step)
    return found
