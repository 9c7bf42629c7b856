"""Arguments that models write in other notations than JSON: converted to JSON, and as grammars.

| notation  | example                                                                    |
|-----------|----------------------------------------------------------------------------|
| tagged    | <parameter=at>3</parameter>; a text stands as it is, any other value is JSON |
| python    | at=3, to="x"                                                               |
| delimited | at:3,to:<escape>x<escape>; keys have no quotes, and texts have these        |

`parameters` are always the schemas of the tools' arguments, by the tools' names.
"""

import ast
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from domain.json_schemas import list_of, map_of
from text.call_readers import without_surrogates

Schema = Mapping[str, Any]

Parameters = Mapping[str, Any]

JsonValue = Callable[[Any], str]  # makes of a schema the right side of a rule

Spelt = Callable[[str], str]  # makes of a text the terminals of a rule

_MAX_NODES = 64  # of a schema, to tell the types of a value

_MAX_DEPTH = 64  # of values in a call

MAX_PYTHON_CHARS = 65_536  # of a call: parsing takes hundreds of times as much memory as the text


class Notation(Protocol):
    def convert(self, text: str, parameters: Parameters) -> tuple[str, str]:
        """The name and the arguments, in JSON, of a whole call. Raises ValueError if it is none."""
        ...

    def rules(self, rule: str, schema: Schema, json_value: JsonValue, spelt: Spelt) -> Iterator[str]:
        """The rules of a grammar for the arguments, in llguidance's variant of Lark."""
        ...


@dataclass(frozen=True, slots=True)
class TaggedArguments:
    """Each argument between tags. `head` matches what is before the first and has the name as its group; `begin` is the
    tag before a value, with the argument's name as `{}`. Grammars do not enforce the lengths, patterns and formats of
    texts."""

    head: re.Pattern[str]
    begin: str
    end: str

    def convert(self, text: str, parameters: Parameters) -> tuple[str, str]:
        head = self.head.match(text)
        if head is None:
            raise ValueError("no name")
        schema = parameters.get(head[1]) or {}
        before, after = (
            r"\s*".join(map(re.escape, part.strip().split("\n"))) for part in self.begin.split("{}", maxsplit=1)
        )
        begin = re.compile(rf'\s*{before}([^<>"\n]+){after}')
        end = re.compile(rf"{re.escape(self.end.strip())}(?={begin.pattern}|\s*\Z)")  # a value may have such a tag, too
        arguments: dict[str, Any] = {}
        place = head.end()
        while (found := begin.match(text, place)) is not None:
            value_end = end.search(text, found.end())
            if value_end is None:
                raise ValueError("an argument has no end")
            value = text[found.end() : value_end.start()].removeprefix("\n").removesuffix("\n")
            name = found[1].strip()
            arguments[name] = _value_of(value, _types_of(map_of(schema, "properties").get(name), schema))
            place = value_end.end()
        if text[place:].strip():
            raise ValueError("more than arguments")
        return head[1].strip(), _dumped(arguments)

    def rules(self, rule: str, schema: Schema, json_value: JsonValue, spelt: Spelt) -> Iterator[str]:
        def value(name: str, of: Any) -> str:
            if _is_text(_types_of(of, schema)):
                return _text_rule(name, of, self.end, spelt)
            return f"{name}: {json_value(of)} {spelt(self.end)}"

        return _chain(rule, schema, value, spelt, begin=self.begin, separator="")


@dataclass(frozen=True, slots=True)
class PythonArguments:
    """Keyword arguments in Python's notation, which grammars reduce to that of JSON."""

    def convert(self, text: str, parameters: Parameters) -> tuple[str, str]:
        del parameters
        if len(text) > MAX_PYTHON_CHARS:
            raise ValueError("too long")
        name, _, written = text.strip().partition("(")
        call = ast.parse(f"f({written}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or not name.strip():
            raise ValueError("no call")
        arguments = {}
        for keyword in call.keywords:
            if keyword.arg is None:
                raise ValueError("no name")
            arguments[keyword.arg] = _python_value(keyword.value)
        return name.strip(), _dumped(arguments)

    def rules(self, rule: str, schema: Schema, json_value: JsonValue, spelt: Spelt) -> Iterator[str]:
        def value(name: str, of: Any) -> str:
            return f"{name}: {json_value(of)}"

        return _chain(rule, schema, value, spelt, begin="{}=", separator=", ")


_NAMES = {"true": True, "false": False, "null": None, "none": None}


def _python_value(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=str() | int() | float() | None as value):
            return value
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_python_value(item) for item in items]
        case ast.Dict(keys=keys, values=values):
            return {_python_key(key): _python_value(value) for key, value in zip(keys, values, strict=True)}
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.Name(id=name) if name.lower() in _NAMES:
            return _NAMES[name.lower()]
    raise ValueError("no literal")


def _python_key(node: ast.expr | None) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    raise ValueError("no key")


@dataclass(frozen=True, slots=True)
class DelimitedArguments:
    """call:name{key:value,…}, in which texts are between `delimiter`s; JSON's quotes are read as well. In grammars,
    lists and objects are JSON, and the lengths, patterns and formats of texts are not enforced."""

    delimiter: str

    def convert(self, text: str, parameters: Parameters) -> tuple[str, str]:
        del parameters
        head = re.match(r"\s*call:\s*([\w.-]+)\s*(?=\{)", text)
        if head is None:
            raise ValueError("no name")
        value, end = self._value(text, head.end(), 0)
        if not isinstance(value, dict) or text[end:].strip():
            raise ValueError("no arguments")
        return head[1], _dumped(value)

    def rules(self, rule: str, schema: Schema, json_value: JsonValue, spelt: Spelt) -> Iterator[str]:
        def value(name: str, of: Any) -> str:
            if not _is_text(_types_of(of, schema)):
                return f"{name}: {json_value(of)}"
            text = _text_rule(f"{name}_text", of, self.delimiter, spelt)
            return f"{text}\n{name}: {spelt(self.delimiter)} {name}_text"

        return _chain(rule, schema, value, spelt, begin="{}:", separator=",")

    def _value(self, text: str, place: int, depth: int) -> tuple[Any, int]:
        """The value that begins at `place`, and its end."""
        if depth > _MAX_DEPTH:
            raise ValueError("too deep")
        place = _behind_blanks(text, place)
        if text.startswith("{", place):
            return self._object(text, place + 1, depth)
        if text.startswith("[", place):
            return self._list(text, place + 1, depth)
        if text.startswith(self.delimiter, place):
            begin = place + len(self.delimiter)
            end = text.index(self.delimiter, begin)
            return text[begin:end], end + len(self.delimiter)
        if text.startswith('"', place):
            return json.JSONDecoder(strict=False).raw_decode(text, place)
        found = re.compile(r"[^,{}\[\]]*").match(text, place)
        assert found is not None
        return _value_of(found[0].strip(), frozenset()), found.end()

    def _object(self, text: str, place: int, depth: int) -> tuple[dict[str, Any], int]:
        members: dict[str, Any] = {}
        key = re.compile(r'(?:"([^"]*)"\s*|([^:{}\[\],"]+)):')
        while not text.startswith("}", place := _behind_blanks(text, place)):
            found = key.match(text, place)
            if found is None:
                raise ValueError("no key")
            members[found[1] if found[1] is not None else found[2].strip()], place = self._value(
                text, found.end(), depth + 1
            )
            place = _behind_comma(text, place, "}")
        return members, place + 1

    def _list(self, text: str, place: int, depth: int) -> tuple[list[Any], int]:
        items: list[Any] = []
        while not text.startswith("]", place := _behind_blanks(text, place)):
            item, place = self._value(text, place, depth + 1)
            items.append(item)
            place = _behind_comma(text, place, "]")
        return items, place + 1


def _behind_blanks(text: str, place: int) -> int:
    while text[place : place + 1].isspace():
        place += 1
    return place


def _behind_comma(text: str, place: int, end: str) -> int:
    place = _behind_blanks(text, place)
    if text.startswith(",", place):
        return place + 1
    if not text.startswith(end, place):
        raise ValueError("no end")
    return place


def _dumped(arguments: Mapping[str, Any]) -> str:
    return without_surrogates(json.dumps(arguments, ensure_ascii=False, allow_nan=False))


def _value_of(text: str, types: frozenset[str]) -> Any:
    """A value that is written without quotes."""
    if _is_text(types):
        return None if text == "null" and "null" in types else text
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return {"True": True, "False": False, "None": None}.get(text, text)


def _refuse(constant: str) -> Any:
    raise ValueError(constant)  # NaN and Infinity are not JSON


def _types_of(schema: Any, root: Mapping[str, Any], seen: dict[int, frozenset[str]] | None = None) -> frozenset[str]:
    """The types that a value may have; none if the schema does not tell. `seen` has those of each node that was
    visited, by its id; none while they are not known yet."""
    seen = {} if seen is None else seen
    if not isinstance(schema, dict):
        return frozenset()
    if id(schema) not in seen and len(seen) < _MAX_NODES:
        seen[id(schema)] = frozenset()
        seen[id(schema)] = _types_of_node(schema, root, seen)
    return seen.get(id(schema), frozenset())


def _types_of_node(schema: dict[str, Any], root: Mapping[str, Any], seen: dict[int, frozenset[str]]) -> frozenset[str]:
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#/"):
        target: Any = root
        for step in reference[2:].split("/"):
            target = target.get(step) if isinstance(target, dict) else None
        return _types_of(target, root, seen)
    kind = schema.get("type")
    if isinstance(kind, str | list):
        return frozenset(one for one in ([kind] if isinstance(kind, str) else kind) if isinstance(one, str))
    values = _fixed_values(schema)
    if values:
        return frozenset("string" if isinstance(value, str) else "other" for value in values)
    branches = [*list_of(schema, "anyOf"), *list_of(schema, "oneOf")]
    types = [_types_of(branch, root, seen) for branch in branches]
    return frozenset[str]().union(*types) if all(types) else frozenset()


def _is_text(types: frozenset[str]) -> bool:
    return "string" in types and types <= {"string", "null"}


def _fixed_values(schema: Mapping[str, Any]) -> list[Any]:
    return [*list_of(dict(schema), "enum"), *([schema["const"]] if "const" in schema else [])]


def _texts_of(schema: Any) -> Sequence[str]:
    return [value for value in _fixed_values(schema) if isinstance(value, str)] if isinstance(schema, dict) else []


def _text_rule(name: str, schema: Any, end: str, spelt: Spelt) -> str:
    """A rule for a text and the `end` behind it, at which it ends first."""
    texts = _texts_of(schema)
    if texts:
        return f"{name}: ({' | '.join(map(json.dumps, texts))}) {spelt(end)}"
    if spelt(end).startswith("<["):  # a special token, which no expression matches
        return f"{name}: /(?s:.*)/ {spelt(end)}"
    expression = "".join(character if character.isalnum() else f"\\x{{{ord(character):x}}}" for character in end)
    return f"{name}[lazy]: /(?s:.*){expression}/"


def _chain(
    rule: str, schema: Schema, value: Callable[[str, Any], str], spelt: Spelt, *, begin: str, separator: str
) -> Iterator[str]:
    """Rules for the schema's properties in their order, in which optional ones may be left out. `value` makes the rule
    of a name for a schema."""
    required = list_of(dict(schema), "required")
    members = list(map_of(dict(schema), "properties").items())
    definitions = {"$defs": schema["$defs"]} if "$defs" in schema else {}
    for number, (name, of) in enumerate(members):
        yield value(f"{rule}_v{number}", of | definitions if isinstance(of, dict) else of)
        yield f"{rule}_m{number}: {spelt(begin.replace('{}', name))} {rule}_v{number}"
        for suffix, before in (("a", ""), ("b", spelt(separator))):  # as the first one, and behind another
            here = f"{before} {rule}_m{number} {rule}_b{number + 1}"
            yield f"{rule}_{suffix}{number}: {here if name in required else f'{here} | {rule}_{suffix}{number + 1}'}"
    yield f'{rule}_a{len(members)}: ""'
    yield f'{rule}_b{len(members)}: ""'
    yield f"{rule}: {rule}_a0"
