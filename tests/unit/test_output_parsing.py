"""Text to reasoning, content and tool calls: the same however it is cut into pieces, and no half tag as content."""

import json
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from text.outputs import (
    CallArguments,
    CallName,
    ContentPiece,
    OutputFormat,
    OutputParser,
    Piece,
    ReasoningFormat,
    ReasoningPiece,
    output_format_of,
)

HERMES = OutputFormat("hermes", ReasoningFormat.TAGGED)
MISTRAL = OutputFormat("mistral")
LLAMA3 = OutputFormat("llama3")
OPENED = OutputFormat(None, ReasoningFormat.OPENED)
NAMES = frozenset({"add", "find"})


def parse(
    texts: Sequence[str],
    format: OutputFormat,
    *,
    is_cut: bool = False,
    max_calls: int | None = None,
    follows_grammar: bool = False,
) -> list[Piece]:
    parser = OutputParser(format, tool_names=NAMES, max_calls=max_calls, follows_grammar=follows_grammar)
    pieces = [piece for text in texts for piece in parser.push(text)] + parser.finish(is_cut=is_cut)
    whole: list[Piece] = []
    for piece in pieces:
        last = whole[-1] if whole else None
        if isinstance(piece, CallName) or isinstance(last, CallName) or last is None or type(last) is not type(piece):
            whole.append(piece)
        else:
            whole[-1] = piece._replace(text=last.text + piece.text)
    return whole


CALL = '<tool_call>\n{"name": "add", "arguments": {"a": "}\\" {", "b": [1, {"c": 2}]}}\n</tool_call>'
ARGUMENTS = '{"a": "}\\" {", "b": [1, {"c": 2}]}'
CASES: list[tuple[str, OutputFormat, list[Piece]]] = [
    ("plain text", HERMES, [ContentPiece("plain text")]),
    ("1 < 2 <tool", HERMES, [ContentPiece("1 < 2 <tool")]),
    (CALL, HERMES, [CallName(0, "add"), CallArguments(0, ARGUMENTS)]),
    ("Let me see.\n" + CALL, HERMES, [ContentPiece("Let me see."), CallName(0, "add"), CallArguments(0, ARGUMENTS)]),
    (
        f"{CALL}\n{CALL.replace('add', 'find')}\n",
        HERMES,
        [CallName(0, "add"), CallArguments(0, ARGUMENTS), CallName(1, "find"), CallArguments(1, ARGUMENTS)],
    ),
    (
        f"<think>\nhm </thin\n</think>\n\n{CALL}",
        HERMES,
        [ReasoningPiece("hm </thin"), CallName(0, "add"), CallArguments(0, ARGUMENTS)],
    ),
    (
        '<tool_call>{"arguments": {"a": 1}, "name": "add"}</tool_call>',
        HERMES,
        [CallName(0, "add"), CallArguments(0, '{"a": 1}')],
    ),
    (
        '<tool_call>{"name": "add", "arguments": {"a": 1}, "id": {"x": 1}}</tool_call>',
        HERMES,
        [CallName(0, "add"), CallArguments(0, '{"a": 1}')],
    ),
    ("<tool_call>nonsense</tool_call> so", HERMES, [ContentPiece("<tool_call>nonsense</tool_call> so")]),
    (
        '[TOOL_CALLS][{"name": "add", "arguments": {"a": 1}}, {"name": "find", "arguments": {}}]',
        MISTRAL,
        [CallName(0, "add"), CallArguments(0, '{"a": 1}'), CallName(1, "find"), CallArguments(1, "{}")],
    ),
    (' [{"name": "add", "arguments": {"a": 1}}]', MISTRAL, [CallName(0, "add"), CallArguments(0, '{"a": 1}')]),
    ("[1, 2] is a list", MISTRAL, [ContentPiece("[1, 2] is a list")]),
    ('{"name": "add", "parameters": {"a": 1}}', LLAMA3, [CallName(0, "add"), CallArguments(0, '{"a": 1}')]),
    (
        '<|python_tag|>{"name": "add", "parameters": {"a": 1}}; {"name": "find", "parameters": {}}',
        LLAMA3,
        [CallName(0, "add"), CallArguments(0, '{"a": 1}'), CallName(1, "find"), CallArguments(1, "{}")],
    ),
    ('{"name": "Jim", "age": 3}', LLAMA3, [ContentPiece('{"name": "Jim", "age": 3}')]),
    ("thinking</think>\n\nanswer", OPENED, [ReasoningPiece("thinking"), ContentPiece("answer")]),
    ("still thinking", OPENED, [ReasoningPiece("still thinking")]),
]


@pytest.mark.parametrize(("text", "format", "expected"), CASES)
def test_a_text_is_taken_apart(text: str, format: OutputFormat, expected: list[Piece]) -> None:
    assert parse([text], format) == expected


@pytest.mark.parametrize(("text", "format", "expected"), CASES)
def test_character_by_character_it_comes_to_the_same(text: str, format: OutputFormat, expected: list[Piece]) -> None:
    assert parse(list(text), format) == expected


@given(st.sampled_from(CASES), st.data())
def test_the_cuts_between_pieces_change_nothing(
    case: tuple[str, OutputFormat, list[Piece]], data: st.DataObject
) -> None:
    text, format, expected = case
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    bounds = [0, *cuts, len(text)]
    assert parse([text[a:b] for a, b in pairwise(bounds)], format) == expected


@given(st.text(alphabet='<>/_tolcahink{}":[]ne \n', max_size=60), st.sampled_from([HERMES, MISTRAL, LLAMA3, OPENED]))
def test_no_text_is_too_strange(text: str, format: OutputFormat) -> None:
    assert parse(list(text), format) == parse([text], format)


def test_arguments_come_while_they_are_written() -> None:
    parser = OutputParser(HERMES, tool_names=NAMES)
    assert parser.push('<tool_call>\n{"name": "add", "arguments": {"a"') == [
        CallName(0, "add"),
        CallArguments(0, '{"a"'),
    ]
    assert parser.push(": 1") == [CallArguments(0, ": 1")]


IN_A_STRING = '{"text":"<tool_call>\\n{\\"name\\": \\"add\\"}"}'
GUIDED: list[tuple[str, OutputFormat, list[Piece]]] = [
    (IN_A_STRING, HERMES, [ContentPiece(IN_A_STRING)]),
    (CALL, HERMES, [CallName(0, "add"), CallArguments(0, ARGUMENTS)]),
    ('{"name":"add","parameters":{"a":1}}', LLAMA3, [ContentPiece('{"name":"add","parameters":{"a":1}}')]),
    ('{"name": "add", "parameters": {"a":1}}', LLAMA3, [CallName(0, "add"), CallArguments(0, '{"a":1}')]),
    ('[{"name":"add","arguments":{}}]', MISTRAL, [ContentPiece('[{"name":"add","arguments":{}}]')]),
    ('[{"name": "add", "arguments": {}}]', MISTRAL, [CallName(0, "add"), CallArguments(0, "{}")]),
    ('[{"name', MISTRAL, [ContentPiece('[{"name')]),
    ("[]", MISTRAL, [ContentPiece("[]")]),
    ("<b>", HERMES, [ContentPiece("<b>")]),
]


@pytest.mark.parametrize(("text", "format", "expected"), GUIDED)
def test_under_a_grammar_an_answer_is_told_from_calls_by_its_beginning(
    text: str, format: OutputFormat, expected: list[Piece]
) -> None:
    format = OutputFormat(format.tools)
    for texts in ([text], list(text)):
        assert parse(texts, format, follows_grammar=True) == expected


@pytest.mark.parametrize("length", range(1, len(CALL)))
def test_a_call_that_was_cut_off_shows_no_half_tag(length: int) -> None:
    pieces = parse(["So: ", CALL[:length]], HERMES, is_cut=True)
    content = "".join(piece.text for piece in pieces if isinstance(piece, ContentPiece))
    assert content.strip() in ("So:", "So: <")


def test_calls_beyond_the_first_are_dropped_where_one_is_asked_for() -> None:
    pieces = parse([CALL + CALL], HERMES, max_calls=1)
    assert [piece.name for piece in pieces if isinstance(piece, CallName)] == ["add"]
    assert json.loads("".join(piece.text for piece in pieces if isinstance(piece, CallArguments)))


@pytest.mark.parametrize(
    ("source", "prompt", "format"),
    [
        ("{{ tools }} <tool_call>", "x", OutputFormat("hermes")),
        ("{{ tools }} [TOOL_CALLS]", "x", OutputFormat("mistral")),
        ("{{ tools }} ipython parameters", "x", OutputFormat("llama3")),
        ("{{ tools }} <tool_call><function=", "x", OutputFormat("qwen3_coder")),
        ("{{ tools }} in words", "x", OutputFormat()),
        ("<think>", "… <think>\n", OutputFormat(None, ReasoningFormat.OPENED)),
        ("<think>", "… ", OutputFormat(None, ReasoningFormat.TAGGED)),
    ],
)
def test_a_template_tells_the_format(source: str, prompt: str, format: OutputFormat) -> None:
    assert output_format_of(source, prompt) == format
