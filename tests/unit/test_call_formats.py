"""Calls that models write badly: what is no call is text, and what is one can be sent back to us."""

import re
import time
from typing import Any

import pytest

from domain.structured_output import ToolCall
from text.call_arguments import DelimitedArguments, TaggedArguments, _types_of
from text.outputs import CallArguments, CallName, ContentPiece, OutputFormat, OutputParser, Piece, joined

TAGGED = TaggedArguments(re.compile(r"\s*<function=([^>\n]+)>"), "<parameter={}>\n", "\n</parameter>\n")


def parse(format: str, *texts: str, parameters: dict[str, Any] | None = None) -> list[Piece]:
    parser = OutputParser(OutputFormat(format), tool_names=frozenset({"f"}), parameters=parameters or {})
    return joined([piece for text in texts for piece in parser.push(text)] + parser.finish(is_cut=False))


def call(arguments: str) -> list[Piece]:
    ToolCall(id="1", name="f", arguments=arguments)
    return [CallName(0, "f"), CallArguments(0, arguments)]


def test_types_of_a_schema_that_refers_to_itself_are_found_at_once() -> None:
    itself = {"$ref": "#/$defs/a"}
    root = {"$defs": {"a": {"anyOf": [{"type": "string"}, *[dict(itself) for _ in range(16)]]}}}
    assert _types_of(itself, root) == frozenset()
    chain = {f"d{n}": {"anyOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(200)}
    assert _types_of({"$ref": "#/$defs/d0"}, {"$defs": chain | {"d200": {"type": "string"}}}) == frozenset()
    texts = {"$defs": {"a": {"type": "string"}}}
    assert _types_of({"anyOf": [dict(itself), dict(itself), {"type": "null"}]}, texts) == {"string", "null"}


@pytest.mark.parametrize("kind", [5, True, 1.5, {}])
def test_a_type_that_is_none_tells_nothing(kind: Any) -> None:
    schemas = {"f": {"properties": {"a": {"type": kind}}}}
    assert TAGGED.convert("<function=f><parameter=a>1</parameter>", schemas) == ("f", '{"a": 1}')


def test_whatever_a_conversion_raises_the_call_is_text() -> None:
    text = "<tool_call><function=f><parameter=a>1</parameter></function></tool_call>"
    assert parse("qwen3_coder", text, parameters={"f": 5}) == [ContentPiece(text)]


@pytest.mark.parametrize(
    ("format", "text", "arguments"),
    [
        ("python", r'[f(a="\ud83d\ude00")]', '{"a": "😀"}'),
        ("python", r'[f(a="\ud83d!")]', '{"a": "\ufffd!"}'),
        (
            "command",
            r'<|START_ACTION|>[{"tool_name": "f", "parameters": {"a": "\ud83d"}}]<|END_ACTION|>',
            '{"a": "\ufffd"}',
        ),
        ("hermes", r'<tool_call>{"name": "f", "arguments": "\ud83d"}</tool_call>', "\ufffd"),
        (
            "qwen3_coder",
            r'<tool_call><function=f><parameter=a>["\ud83d"]</parameter></function></tool_call>',
            '{"a": ["\ufffd"]}',
        ),
        ("function_gemma", r'<start_function_call>call:f{a:"\ud83d"}<end_function_call>', '{"a": "\ufffd"}'),
    ],
)
def test_escapes_make_no_half_characters(format: str, text: str, arguments: str) -> None:
    assert parse(format, text) == call(arguments)


@pytest.mark.parametrize("name", ["a b", "", r"\u0000", r"\ud83d", r"\q", "a" * 65])
def test_a_call_of_what_no_tool_is_named_is_text(name: str) -> None:
    hermes = f'<tool_call>{{"name": "{name}", "arguments": {{}}}}</tool_call>'
    assert parse("hermes", hermes) == [ContentPiece(hermes)]
    tagged = f"<tool_call><function={name}></function></tool_call>"
    assert parse("qwen3_coder", tagged) == [ContentPiece(tagged)]


def test_blanks_without_a_key_are_read_in_linear_time() -> None:
    started = time.process_time()
    with pytest.raises(ValueError, match="no key"):
        DelimitedArguments("<escape>").convert("call:f{a" + " " * 200_000 + "}", {})
    assert time.process_time() - started < 2
    assert DelimitedArguments("<escape>").convert('call:f{ a b : 1, "c" : 2}', {}) == ("f", '{"a b": 1, "c": 2}')


def test_tagged_arguments() -> None:
    schemas = {"f": {"properties": {"a b": {"type": "string"}}}}
    written = "<function=f>\n<parameter=a b>\nx </parameter> y\n</parameter>\n<parameter=c*>\n1\n</parameter>\n"
    assert TAGGED.convert(written, schemas) == ("f", '{"a b": "x </parameter> y", "c*": 1}')
    for text in ("<function=f> so", "<function=f><parameter=a>1</parameter> so"):
        with pytest.raises(ValueError, match="argument"):
            TAGGED.convert(text, {})


@pytest.mark.parametrize("between", ["", "\n", "\n  "])
def test_glm_needs_no_newline_between_key_and_value(between: str) -> None:
    text = f"<tool_call>f\n<arg_key>a</arg_key>{between}<arg_value>1</arg_value></tool_call>"
    assert parse("glm45", text) == call('{"a": 1}')


@pytest.mark.parametrize("num_missing", [1, 2])
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_a_missing_brace_swallows_nothing_behind_the_call(num_missing: int, size: int) -> None:
    broken = '<tool_call>\n{"name": "f", "arguments": {"a": "</tool_call>"' + "}" * (2 - num_missing) + "</tool_call>"
    text = broken + '\n<tool_call>{"name": "f", "arguments": {}}</tool_call> So.'
    pieces = parse("hermes", *(text[start : start + size] for start in range(0, len(text), size)))
    first = CallArguments(0, '{"a": "</tool_call>"' + "}" * (2 - num_missing))
    assert pieces == [CallName(0, "f"), first, CallName(1, "f"), CallArguments(1, "{}"), ContentPiece("So.")]
