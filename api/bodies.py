"""JSON bodies in: strict, bounded, and refused with the field, the value seen and the remedy.

Nothing here takes more than linear time, and little of that for what is refused: lengths come first, then the first
error alone. What is done to a large body is done off the event loop.
"""

import asyncio
import difflib
import json
import re
from collections.abc import Callable
from typing import Any, NoReturn, ParamSpec, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from api.body_parts import drop_nulls, owner_at
from api.deps import services_of
from api.errors import RequestTimeout, UnsupportedMediaType
from api.ignored_fields import HintTree, hint_at, note_ignored, take_hints
from api.lengths import Overlong, UnknownFields, first_excess
from domain.errors import InvalidRequest, UnsupportedParameter

MAX_DEPTH = 32
MAX_FEW = 1_024
MAX_CONTAINERS = 65_536  # lists and objects of one body, wherever they are
UNSUPPORTED = "unsupported_parameter"  # the kind of a validation error that refuses a field we know and do not serve
BODY_SECONDS = 30.0
MAX_PARAM_CHARS = 128
_MAX_SHOWN_CHARS = 40

#: Fields whose text may be private: errors give their length, never their value.
_PRIVATE_FIELDS = frozenset({"prompt", "messages", "content", "stop", "metadata", "idempotency_key", "webhook", "url"})

_SUBJECT = re.compile(r"^(Input|String|Tuple|Dictionary|List) should")

Model = TypeVar("Model", bound=BaseModel)
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


def parse_model(body: bytes, model: type[Model], hints: HintTree | None = None) -> Model:
    """Strict: no coercion between JSON types, no unknown or duplicate key, no NaN, no deep nesting. A null says
    nothing, and what `hints` cover is left out and noted."""
    value = _parse_json(body)
    num_containers = _num_containers(value)
    _refuse_excess(value, model)
    if num_containers > MAX_CONTAINERS:
        param = _param_of(_heaviest(value))
        raise InvalidRequest(
            f"{param or 'the body'} is made of {num_containers} lists and objects; at most {MAX_CONTAINERS} are taken "
            "in all, send fewer",
            param=param,
        )
    body = _without_nothing(value, body, model, hints or {})
    try:
        return model.model_validate_json(body, strict=True)
    except ValidationError as exc:
        raise _refused_hint(exc, hints or {}) or invalid_request(exc, model) from None


def _refused_hint(exc: ValidationError, hints: HintTree) -> UnsupportedParameter | None:
    """The first error of `exc`, where it is a field that can be left out, but not with this value."""
    first = exc.errors(include_url=False, include_context=False)[0]
    location = _location(first)
    hint = hint_at(hints, location) if first["type"] == "extra_forbidden" else None
    if hint is None:
        return None
    param = ".".join(str(part) for part in location)
    taken = " or ".join(json.dumps(value) for value in hint.values)
    return UnsupportedParameter(
        f"{param} is {_shown(location, first['input'])}: it is taken as {taken} only; leave it out", param=param
    )


def _without_nothing(parsed: object, body: bytes, model: type[BaseModel], hints: HintTree) -> bytes:
    """The body again, without what does not count. `parsed` is taken apart."""
    is_changed = b"null" in body and drop_nulls(parsed, model)
    own_fields = {field.alias or name for name, field in model.model_fields.items()}
    ignored = take_hints(parsed, hints, own_fields=own_fields)
    note_ignored(ignored)
    return json.dumps(parsed).encode() if is_changed or ignored else body


def _parse_json(body: bytes) -> object:
    """Refuses what a JSON parser lets pass in silence. Pydantic parses the body a second time, for its types."""
    if not body.strip():
        raise InvalidRequest("the body is empty; send a JSON object")
    try:
        return json.loads(body.decode(), object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except UnicodeDecodeError as exc:
        raise InvalidRequest(f"the body is not UTF-8: byte {exc.start} is invalid") from None
    except json.JSONDecodeError as exc:
        raise InvalidRequest(f"the body is not JSON: {exc.msg} at line {exc.lineno} column {exc.colno}") from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError:  # the interpreter's bound on the digits of an integer
        raise InvalidRequest(
            "the body holds an integer of thousands of digits; send numbers of at most 64 bits"
        ) from None


def _num_containers(value: object) -> int:
    """How many lists and objects there are. Raises InvalidRequest where they are nested too deeply."""
    level, num_containers = [value], 0
    for _ in range(MAX_DEPTH + 1):
        containers = [part for part in level if isinstance(part, dict | list)]
        if not containers:
            return num_containers
        num_containers += len(containers)
        level = [part for whole in containers for part in (whole.values() if isinstance(whole, dict) else whole)]
    raise _too_deep()


def _heaviest(value: object) -> tuple[int | str, ...]:
    """Where most of the lists and objects are: inwards, as long as one of a few parts holds more than half of them."""
    if not isinstance(value, dict | list) or len(value) > MAX_FEW:
        return ()
    parts = dict(value.items() if isinstance(value, dict) else enumerate(value))
    num_inside = {name: _num_containers(part) for name, part in parts.items()}
    name = max(num_inside, key=lambda name: num_inside[name], default=None)
    if name is None or 2 * num_inside[name] <= sum(num_inside.values()):
        return ()
    return (name, *_heaviest(parts[name]))


def _too_deep() -> InvalidRequest:
    return InvalidRequest(f"the body is nested more than {MAX_DEPTH} levels deep; flatten it")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) == len(pairs):
        return unique
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            raise InvalidRequest(
                f"the key {key[:64]!r} appears more than once in one object; send it once", param=key[:64]
            )
        seen.add(key)
    raise AssertionError("fewer keys than pairs, and none twice")


def _refuse_excess(value: object, model: type[BaseModel]) -> None:
    match first_excess(value, model):
        case Overlong(location, length, bound):
            param = _param_of(location)
            raise InvalidRequest(
                f"{param or 'the body'} has {length} items; at most {bound} items are taken, send fewer", param=param
            )
        case UnknownFields(location):
            param = _param_of(location)
            raise InvalidRequest(f"{param} is not a field here; {_suggestion(location, model)}", param=param)


def _param_of(location: tuple[int | str, ...]) -> str | None:
    return ".".join(str(part)[:MAX_PARAM_CHARS] for part in location)[:MAX_PARAM_CHARS] or None


def _refuse_constant(constant: str) -> NoReturn:
    raise InvalidRequest(f"the body holds {constant}, which is not JSON; send a finite number or null")


def invalid_request(exc: ValidationError, model: type[BaseModel]) -> InvalidRequest:
    """The first error of `exc` in our words: field, value seen, remedy."""
    first, *others = exc.errors(include_url=False, include_context=False)
    location = _location(first)
    param = _param_of(location)
    # A collection whose items are wrong is reported a second time, as too short.
    num_more = sum(location[: len(_location(other))] != _location(other) for other in others)
    more = f" (and {num_more} more)" if num_more else ""
    refusal = UnsupportedParameter if first["type"] == UNSUPPORTED else InvalidRequest
    return refusal(f"{_describe(first, param, model)}{more}", param=param)


def _location(error: Any) -> tuple[int | str, ...]:
    """Without the tags of unions, which are spelt <so> and are no fields. An unknown field may be spelt so, too."""
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
        return f"{param} is not a field here; {_suggestion(error['loc'], model)}"
    if kind == "json_invalid":
        return f"the body is not JSON: {message}"
    if kind == UNSUPPORTED:
        return f"{param} {message}"
    if param is None or kind == "value_error":
        return message if param is None else f"{param}: {message}"
    return f"{param} is {_shown(location, error['input'])}: {message}"


def _suggestion(location: tuple[int | str, ...], model: type[BaseModel]) -> str:
    owner = owner_at(model, location[:-1])
    known = [field.alias or name for name, field in owner.model_fields.items()] if owner else []
    close = difflib.get_close_matches(str(location[-1])[:64], known, n=1)
    if close:
        return f"did you mean {close[0]}?"
    return f"known are: {', '.join(known)}" if known else "remove it"


def _shown(location: tuple[int | str, ...], value: object) -> str:
    """A short picture of a refused value that gives nothing private away."""
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
