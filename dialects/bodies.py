"""Strict, bounded parsing of JSON bodies. Refusals name the field, the value seen and the remedy."""

import difflib
import json
import math
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, Discriminator, Tag, ValidationError

from dialects.aliases import take_aliases
from dialects.fields import HintTree, Overlong, UnknownFields, first_excess, hint_at, note_ignored, take_hints
from dialects.strict_json import DuplicateKey, NotFinite, loads_strictly
from domain.errors import CeleriacError, InvalidRequest, UnsupportedParameter


@dataclass(slots=True)
class Shape:
    """What a pydantic model declares for one of its fields: an object, a list, or one of several shapes chosen by a
    tag. None of these if the value is the user's own, such as metadata."""

    model: type[BaseModel] | None = None
    items: "Shape | None" = None
    discriminator: Callable[[Any], Hashable] | None = None
    by_tag: dict[Hashable, "Shape"] = field(default_factory=dict)

    def of(self, value: object) -> "Shape | None":
        return self if self.discriminator is None else self.by_tag.get(self.discriminator(value))

    def arms(self) -> "Iterable[Shape]":
        return self.by_tag.values() or (self,)


def drop_nulls(body: object, model: type[BaseModel]) -> bool:
    """Remove from `body` the nulls that mean nothing: those of unknown fields and of fields that may be omitted. The
    user's own values, such as schemas and metadata, stay as they are. True if anything was removed."""
    is_changed = False
    waiting: list[tuple[object, Shape]] = [(body, Shape(model))]
    while waiting:
        value, any_shape = waiting.pop()
        shape = any_shape.of(value)
        if shape is None:
            continue
        if isinstance(value, list) and shape.items is not None:
            items = shape.items
            waiting += [(item, items) for item in value if isinstance(item, dict | list)]
        elif isinstance(value, dict) and shape.model is not None:
            is_changed = _drop_own(value, shape.model) or is_changed
            shapes = shapes_of(shape.model)
            waiting += [(inner, shapes[name]) for name, inner in value.items() if name in shapes]
    return is_changed


def _drop_own(value: dict[str, Any], model: type[BaseModel]) -> bool:
    required = _required_of(model)
    nothing = [name for name, inner in value.items() if inner is None and name not in required]
    for name in nothing:
        del value[name]
    return bool(nothing)


def owner_at(model: type[BaseModel], location: Sequence[int | str]) -> type[BaseModel] | None:
    """The model of the object at `location`, which has the form of pydantic's error locations, with the tags of unions.
    If a tag is missing, one of the possible models."""
    shape: Shape | None = Shape(model)
    for step in location:
        shape = _step_into(shape, step) if shape is not None else None
    return None if shape is None else next((arm.model for arm in shape.arms() if arm.model is not None), None)


def _step_into(shape: Shape, step: int | str) -> Shape | None:
    if step in shape.by_tag:
        return shape.by_tag[step]
    for arm in shape.arms():
        if isinstance(step, int) and arm.items is not None:
            return arm.items
        if isinstance(step, str) and arm.model is not None and step in shapes_of(arm.model):
            return shapes_of(arm.model)[step]
    return None


@cache
def shapes_of(model: type[BaseModel]) -> dict[str, Shape]:
    """The shapes of its fields that hold more than plain values, by the name that bodies use."""
    annotations = get_type_hints(model, include_extras=True)
    shapes = {info.alias or name: _shape_of(annotations[name]) for name, info in model.model_fields.items()}
    return {name: shape for name, shape in shapes.items() if shape != Shape()}


@cache
def _names_of(model: type[BaseModel]) -> frozenset[str]:
    """Its fields, as bodies name them."""
    return frozenset(info.alias or name for name, info in model.model_fields.items())


@cache
def _required_of(model: type[BaseModel]) -> frozenset[str]:
    return frozenset(info.alias or name for name, info in model.model_fields.items() if info.is_required())


def _shape_of(annotation: Any) -> Shape:
    if get_origin(annotation) is Annotated:
        inner, *extras = get_args(annotation)
        discriminators = [extra.discriminator for extra in extras if isinstance(extra, Discriminator)]
        by = next((one for one in discriminators if callable(one)), None)
        return _shape_of(inner) if by is None else Shape(discriminator=by, by_tag=_tagged(inner))
    if get_origin(annotation) in (Union, UnionType):
        return next((shape for arm in get_args(annotation) if (shape := _shape_of(arm)) != Shape()), Shape())
    if get_origin(annotation) in (list, tuple, Sequence):
        return Shape(items=_shape_of(get_args(annotation)[0]))
    return Shape(annotation) if isinstance(annotation, type) and issubclass(annotation, BaseModel) else Shape()


def _tagged(union: Any) -> dict[Hashable, Shape]:
    arms = [(arm, extra.tag) for arm in get_args(union) for extra in get_args(arm) if isinstance(extra, Tag)]
    return {tag: _shape_of(arm) for arm, tag in arms}


MAX_DEPTH = 32

MIN_INTEGER, MAX_INTEGER = -(2**63), 2**64 - 1

MAX_SEARCHED = 1_024  # entries of one container, when the largest part of a body is looked for

MAX_CONTAINERS = 65_536  # lists and objects per body, at any depth

UNSUPPORTED = "unsupported_parameter"  # the type of validation error for a known field that is not supported

MAX_PARAM_CHARS = 128

_MAX_SHOWN_CHARS = 40

#: Fields whose text may be private: errors give their length, never their value.
_PRIVATE_FIELDS = frozenset({"prompt", "messages", "content", "stop", "metadata", "idempotency_key", "webhook", "url"})

_SUBJECT = re.compile(r"^(Input|String|Tuple|Dictionary|List) should")

#: A client's value in quotation marks (an apostrophe does not open any), or a word such as the path of a field.
_QUOTED_OR_NAME = re.compile(r"""((?<!\w)'(?:[^'\\]|\\.)*'(?!\w)|"(?:[^"\\]|\\.)*")|(\w+(?:\.\w+)*)""")

Model = TypeVar("Model", bound=BaseModel)


def parse_model(
    body: bytes, model: type[Model], hints: HintTree | None = None, *, default_model: str | None = None
) -> Model:
    """Parse strictly: no coercion between JSON types, no unknown or duplicate keys, no NaN, no deep nesting. A null
    means that the field is absent; fields covered by `hints` are dropped and noted. A body without a `model` gets
    `default_model`, if there is one."""
    value = _parse_json(body)
    num_containers, may_exceed = _walk(value)
    _refuse_excess(value, model)
    if num_containers > MAX_CONTAINERS:
        param = _param_of(_heaviest(value))
        raise InvalidRequest(
            f"{param or 'the body'} has {num_containers} lists and objects; send at most {MAX_CONTAINERS} in all",
            param=param,
        )
    own_fields = _names_of(model)
    spelling = take_aliases(value, getattr(model, "ALIASES", {}), own_fields)
    is_changed = bool(spelling)
    if is_changed:
        _, may_exceed = _walk(value)  # an alias may have brought in what a string held
    if default_model is not None and isinstance(value, dict) and value.get("model") is None:
        value["model"] = default_model
        is_changed = True
    body = _cleaned(value, body, model, hints or {}, own_fields, is_changed=is_changed)
    try:
        parsed = model.model_validate_json(body, strict=True)
    except ValidationError as exc:
        refusal = _refused_hint(exc, hints or {}) or invalid_request(exc, model)
        raise (with_body_names(refusal, spelling) if spelling else refusal) from None
    if may_exceed and (found := _excessive_number(value)) is not None:  # fields with bounds have refused theirs before
        raise with_body_names(_beyond_json(*found), spelling)
    return parsed


def _refused_hint(exc: ValidationError, hints: HintTree) -> UnsupportedParameter | None:
    """The first error of `exc`, if it is about a field that may be ignored, but not with this value."""
    first = exc.errors(include_url=False, include_context=False)[0]
    location = _location(first)
    hint = hint_at(hints, location) if first["type"] == "extra_forbidden" else None
    if hint is None:
        return None
    param = ".".join(str(part) for part in location)
    taken = " or ".join(json.dumps(value) for value in hint.values)
    return UnsupportedParameter(
        f"{param} is {_shown(location, first['input'])}: only {taken} is accepted; leave it out", param=param
    )


def _cleaned(
    parsed: object,
    body: bytes,
    model: type[BaseModel],
    hints: HintTree,
    own_fields: frozenset[str],
    *,
    is_changed: bool,
) -> bytes:
    """The body without meaningless nulls and ignored fields. Modifies `parsed`, which differs from the body already if
    `is_changed`."""
    has_nulls = b"null" in body and drop_nulls(parsed, model)
    ignored = take_hints(parsed, hints, own_fields=own_fields)
    note_ignored(ignored)
    return json.dumps(parsed).encode() if is_changed or has_nulls or ignored else body


def _parse_json(body: bytes) -> object:
    """Refuses what a JSON parser silently accepts. Pydantic parses the body a second time, for its types."""
    if not body.strip():
        raise InvalidRequest("the body is empty; send a JSON object")
    try:
        return loads_strictly(body.decode())
    except UnicodeDecodeError as exc:
        raise InvalidRequest(f"the body is not UTF-8: byte {exc.start} is invalid; encode it as UTF-8") from None
    except DuplicateKey as exc:
        raise InvalidRequest(str(exc), param=exc.key) from None
    except NotFinite as exc:
        raise InvalidRequest(f"the body contains {exc}") from None
    except json.JSONDecodeError as exc:
        raise InvalidRequest(f"the body is not JSON: {exc.msg} at line {exc.lineno} column {exc.colno}") from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError:  # the interpreter's limit on the digits of an integer
        raise InvalidRequest(
            "the body contains an integer of thousands of digits; send numbers of at most 64 bits"
        ) from None


def _walk(value: object) -> tuple[int, bool]:
    """How many lists and objects there are, and whether a number may be beyond 64 bits or not finite. Raises
    InvalidRequest if they are nested too deeply."""
    level: list[Any] = [value]
    num_containers, may_exceed = 0, False
    for _ in range(MAX_DEPTH + 1):
        num_before = num_containers
        inner: list[Any] = []
        for part in level:
            kind = type(part)
            if kind is dict:
                num_containers += 1
                inner += part.values()
            elif kind is list:
                num_containers += 1
                inner += part
            elif (kind is int or kind is float) and not MIN_INTEGER <= part <= MAX_INTEGER:
                may_exceed = True
        if num_containers == num_before:
            return num_containers, may_exceed
        level = inner
    raise _too_deep()


def _is_excessive(part: object) -> bool:
    """Whether it is a number that JSON writers refuse, which bodies meet when they are stored."""
    if isinstance(part, float):
        return not math.isfinite(part)
    return isinstance(part, int) and not MIN_INTEGER <= part <= MAX_INTEGER


def _excessive_number(value: object) -> tuple[tuple[int | str, ...], object] | None:
    """One such number with its path, if there is any."""
    waiting: list[tuple[tuple[int | str, ...], Any]] = [((), value)]
    while waiting:
        location, part = waiting.pop()
        if isinstance(part, dict | list):
            parts = part.items() if isinstance(part, dict) else enumerate(part)
            waiting += [((*location, name), inner) for name, inner in parts]
        elif _is_excessive(part):
            return location, part
    return None


def _beyond_json(location: tuple[int | str, ...], number: object) -> InvalidRequest:
    param = _param_of(location)
    return InvalidRequest(
        f"{param or 'the body'} is {_shown(location, number)}: it must be finite and, if an integer, between "
        f"{MIN_INTEGER} and {MAX_INTEGER}; send it as a string",
        param=param,
    )


def _heaviest(value: object) -> tuple[int | str, ...]:
    """The path of the part with most of the lists and objects: descends while one part has more than half of them."""
    if not isinstance(value, dict | list) or len(value) > MAX_SEARCHED:
        return ()
    parts = dict(value.items() if isinstance(value, dict) else enumerate(value))
    num_inside = {name: _walk(part)[0] for name, part in parts.items()}
    name = max(num_inside, key=lambda name: num_inside[name], default=None)
    if name is None or 2 * num_inside[name] <= sum(num_inside.values()):
        return ()
    return (name, *_heaviest(parts[name]))


def _too_deep() -> InvalidRequest:
    return InvalidRequest(f"the body is nested more than {MAX_DEPTH} levels deep; flatten it")


def _refuse_excess(value: object, model: type[BaseModel]) -> None:
    match first_excess(value, model):
        case Overlong(location, length, bound):
            param = _param_of(location)
            raise InvalidRequest(f"{param or 'the body'} has {length} items; send at most {bound}", param=param)
        case UnknownFields(location):
            param = _param_of(location)
            raise InvalidRequest(f"{param} is not a known field; {_suggestion(location, model)}", param=param)


def _param_of(location: tuple[int | str, ...]) -> str | None:
    return ".".join(str(part)[:MAX_PARAM_CHARS] for part in location)[:MAX_PARAM_CHARS] or None


def invalid_request(exc: ValidationError, model: type[BaseModel]) -> InvalidRequest:
    """The first error of `exc` as a refusal: field, value seen, remedy."""
    first, *others = exc.errors(include_url=False, include_context=False)
    location = _location(first)
    param = _param_of(location)
    # A collection with invalid items is reported a second time, as too short.
    num_more = sum(location[: len(_location(other))] != _location(other) for other in others)
    more = f" (and {num_more} more)" if num_more else ""
    refusal = UnsupportedParameter if first["type"] == UNSUPPORTED else InvalidRequest
    return refusal(f"{_describe(first, param, model)}{more}", param=param)


def _location(error: Any) -> tuple[int | str, ...]:
    """The location without the tags of unions, spelled <so>, which are not fields. An unknown field may have that
    spelling, too."""
    *outer, last = error["loc"] or ("",)
    is_named = error["type"] == "extra_forbidden" or not str(last).startswith("<")
    path = tuple(part for part in outer if not str(part).startswith("<"))
    return (*path, last) if is_named and error["loc"] else path


def _describe(error: Any, param: str | None, model: type[BaseModel]) -> str:
    kind, location = error["type"], _location(error)
    message = _SUBJECT.sub("it must", str(error["msg"]).removeprefix("Value error, ").removeprefix("Invalid JSON: "))
    if kind == "missing":
        return f"{param} is missing; add it"
    if kind == "extra_forbidden":
        return f"{param} is not a known field; {_suggestion(error['loc'], model)}"
    if kind == "json_invalid":
        return f"the body is not JSON: {message}"
    if kind == UNSUPPORTED:
        return f"{param} {message}"
    if param is None or kind == "value_error":
        return message if param is None else f"{param}: {message}"
    example = ", such as 2026-10-20T12:00:00Z" if kind.startswith(("datetime_", "timezone_")) else ""
    return f"{param} is {_shown(location, error['input'])}: {message}{example}"


def _suggestion(location: tuple[int | str, ...], model: type[BaseModel]) -> str:
    owner = owner_at(model, location[:-1])
    known = [field.alias or name for name, field in owner.model_fields.items()] if owner else []
    close = difflib.get_close_matches(str(location[-1])[:64], known, n=1)
    if close:
        return f"did you mean {close[0]}?"
    return f"the fields are: {', '.join(known)}" if known else "remove it"


def _shown(location: tuple[int | str, ...], value: object) -> str:
    """A short description of a refused value that reveals nothing private."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if isinstance(value, str) and (len(value) > _MAX_SHOWN_CHARS or _is_private(location)):
        return f"a string of {len(value)} characters"
    return json.dumps(value, default=str)[:_MAX_SHOWN_CHARS]


def _is_private(location: tuple[int | str, ...]) -> bool:
    names = [part for part in location if isinstance(part, str)]
    return bool(names) and (names[0] == "metadata" or names[-1] in _PRIVATE_FIELDS)


def with_body_names(exc: CeleriacError, spelling: Mapping[str, str]) -> CeleriacError:
    """The same error, with the body's field names instead of ours. Quoted text is the client's and stays as it is."""
    exc.message = _QUOTED_OR_NAME.sub(lambda found: found[1] or _spelt(found[2], spelling), exc.message)
    exc.param = exc.param and _spelt(exc.param, spelling)
    return exc


def _spelt(path: str, spelling: Mapping[str, str]) -> str:
    """Rename the longest prefix of a path that the body names differently."""
    path = path.removeprefix("params.")
    for length in range(path.count(".") + 1, 0, -1):
        steps = path.split(".")
        ours, rest = ".".join(steps[:length]), steps[length:]
        if ours in spelling:
            return ".".join([spelling[ours], *rest])
    return path
