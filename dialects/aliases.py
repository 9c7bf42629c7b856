"""Names under which other servers know fields of ours: one table, which docs/api.md shows.

An alias is renamed before validation, so whatever holds for the field holds for it. A body that declares a field of
that name reads it as such. Sent together with the field that it stands for, it is refused.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from dialects.strict_json import DuplicateKey, NotFinite, loads_strictly
from domain.errors import InvalidRequest, UnsupportedParameter
from text.grammars import gbnf_in_lark


class Alias(NamedTuple):
    """`ours` is the path of a field; `read` turns the value that others use into ours, and raises ValueError."""

    ours: str
    read: Callable[[Any], Any] | None = None
    note: str = ""  # for the table, what `read` does


Aliases = Mapping[str, Alias]


MAX_SCHEMA_CHARS = 65_536  # of a schema that is sent as a string


def _schema(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if len(value) > MAX_SCHEMA_CHARS:
        raise ValueError(f"it is a string of {len(value)} characters; send at most {MAX_SCHEMA_CHARS}, or an object")
    try:
        return loads_strictly(value)
    except DuplicateKey as exc:
        raise ValueError(f"it is a string in which {exc}") from None
    except NotFinite as exc:
        raise ValueError(f"it is a string that contains {exc}") from None
    except (ValueError, RecursionError):
        raise ValueError("it is a string that is not JSON; send the schema as an object") from None


def _grammar(value: Any) -> Any:
    return gbnf_in_lark(value) if isinstance(value, str) else value


_OUTPUTS: Final[Mapping[str, tuple[str, Callable[[Any], Any] | None]]] = {
    "json": ("json_schema", _schema),
    "json_object": ("json_object", None),
    "regex": ("regex", None),
    "choice": ("choices", None),
    "grammar": ("lark", _grammar),
}

#: Of vLLM's structured outputs: they choose between ways to the same output.
_IDLE_OPTIONS: Final = frozenset({"disable_fallback", "disable_any_whitespace"})


def _structured(value: Any) -> Any:
    """vLLM's structured outputs as ours."""
    if not isinstance(value, dict):
        return value
    output: dict[str, Any] = {}
    for name, inner in value.items():
        if inner is None or name in _IDLE_OPTIONS or inner is False:
            continue
        if name not in _OUTPUTS:
            raise ValueError(f"it has {name[:64]!r}; send one of {', '.join(_OUTPUTS)}")
        ours, read = _OUTPUTS[name]
        output[ours] = inner if read is None else read(inner)
    return output


_SCHEMA_NOTE = "a string is parsed as JSON"

_GRAMMAR_NOTE = "GBNF or Lark"

#: Of all bodies that generate text.
SAMPLING: Final[dict[str, Alias]] = {
    "repeat_penalty": Alias("repetition_penalty"),
    "min_new_tokens": Alias("min_tokens"),
    "stop_sequences": Alias("stop"),
}

OUTPUT: Final[dict[str, Alias]] = {
    "structured_outputs": Alias("structured_output", _structured, ", ".join(_OUTPUTS) + " in it, as below"),
    "guided_json": Alias("structured_output.json_schema", _schema, _SCHEMA_NOTE),
    "guided_regex": Alias("structured_output.regex"),
    "guided_choice": Alias("structured_output.choices"),
    "guided_grammar": Alias("structured_output.lark", _grammar, _GRAMMAR_NOTE),
    "json_schema": Alias("structured_output.json_schema", _schema, _SCHEMA_NOTE),
    "regex": Alias("structured_output.regex"),
    "ebnf": Alias("structured_output.lark", _grammar, _GRAMMAR_NOTE),
    "grammar": Alias("structured_output.lark", _grammar, _GRAMMAR_NOTE),
}

MAX_TOKENS: Final[dict[str, Alias]] = {
    name: Alias("max_tokens") for name in ("max_new_tokens", "n_predict", "max_completion_tokens")
}

MAX_OUTPUT_TOKENS: Final[dict[str, Alias]] = {
    name: Alias("max_output_tokens") for name in ("max_tokens", "max_new_tokens", "n_predict", "max_completion_tokens")
}


def take_aliases(body: object, aliases: Aliases, own_fields: frozenset[str]) -> dict[str, str]:
    """Rename the aliases in a parsed body. Returns the names that it used, by the paths of our fields. Raises
    InvalidRequest."""
    if not isinstance(body, dict):
        return {}
    used: dict[str, str] = {}
    for name in [name for name in body if name in aliases and name not in own_fields]:
        if body[name] is None:
            continue  # as if it were absent, like that of any other field
        alias = aliases[name]
        value = _read(name, alias, body.pop(name))
        outer, _, inner = alias.ours.partition(".")
        if inner and body.get(outer) is None:
            body[outer] = {}
        part = body[outer] if inner else body
        if not isinstance(part, dict) or part.get(inner or outer) is not None:
            other = used.get(alias.ours, alias.ours)
            raise InvalidRequest(f"{name} and {other} mean the same; send only one of them", param=name)
        part[inner or outer] = value
        used[alias.ours] = name
    return used


def _read(name: str, alias: Alias, value: Any) -> Any:
    if alias.read is None:
        return value
    try:
        return alias.read(value)
    except ValueError as exc:
        raise UnsupportedParameter(f"{name}: {exc}", param=name) from None
