"""Outputs of every family, of any text: the same however they are cut, no word lost, and the cost linear."""

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.structured_output import MAX_ARGUMENT_CHARS, ToolCall
from text.call_arguments import MAX_PYTHON_CHARS
from text.call_formats import FORMATS
from text.call_readers import CallReader
from text.harmony import HarmonyParser
from text.outputs import (
    MAX_CALLS,
    CallArguments,
    CallName,
    ContentPiece,
    OutputFormat,
    OutputParser,
    Piece,
    ReasoningFormat,
    ReasoningPiece,
    joined,
)

HARMONY = ("<|end|>", "<|call|>", "<|return|>", "assistant", "<|channel|>final<|message|>", " to=functions.f")

PIECES = (
    "{",
    "}",
    "[",
    "]",
    "(",
    ")",
    '"',
    ":",
    ",",
    "'",
    "=",
    " ",
    "\n",
    "f",
    "call:",
    '{"name": "f", "arguments": {',
)


def parser_of(format: str) -> OutputParser:
    if format == "harmony":
        return HarmonyParser(tool_names=frozenset({"f"}))
    return OutputParser(OutputFormat(format, ReasoningFormat.TAGGED), tool_names=frozenset({"f"}))


def parse(format: str, texts: Sequence[str]) -> list[Piece]:
    parser = parser_of(format)
    return joined([piece for text in texts for piece in parser.push(text)] + parser.finish(is_cut=False))


def call_of(format: str) -> str:
    shape = FORMATS[format].shape
    call = shape.call.replace("{name}", "f").replace("{arguments}", "{}" if shape.arguments is None else "")
    return shape.begin + call + shape.end


@st.composite
def outputs(draw: st.DrawFn) -> tuple[str, list[str]]:
    format = draw(st.sampled_from(sorted(FORMATS)))
    words = iter([f"word{number}" for number in range(40)])
    marks = sorted(FORMATS[format].markers) + list(HARMONY if format == "harmony" else ("<think>", "</think>"))
    kinds = st.sampled_from([*PIECES, *marks, *marks, call_of(format), "word", "word"])
    parts = [next(words) + " " if part == "word" else part for part in draw(st.lists(kinds, max_size=30))]
    text = "".join(parts)
    cuts = sorted(draw(st.sets(st.integers(0, len(text)), max_size=12)))
    return format, [text[a:b] for a, b in pairwise([0, *cuts, len(text)])]


@given(outputs())
def test_any_text_reads_the_same_however_it_is_cut(output: tuple[str, list[str]]) -> None:
    format, texts = output
    text = "".join(texts)
    whole = parse(format, [text])
    assert parse(format, texts) == whole
    assert parse(format, list(text)) == whole


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_long_texts_read_the_same_in_pieces(format: str) -> None:
    text = f"{' ' * 700}So {'x' * 700}: {call_of(format)} {' ' * 700}and {'<|' * 300}{call_of(format)}"
    for size in (1, 3, 255, 256, 257):
        assert parse(format, [text[at : at + size] for at in range(0, len(text), size)]) == parse(format, [text])


@pytest.mark.parametrize(
    ("format", "call", "broken"),
    [
        ("kimi_k2", '<|tool_call_begin|>f:0<|tool_call_argument_begin|>{"a": 1}<|tool_call_end|>', None),
        ("deepseek_v31", '<｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a": 1}<｜tool▁call▁end｜>', None),
        ("mistral_args", '[TOOL_CALLS]f[ARGS]{"a": 1}', None),
        ("mistral", '{"name": "f", "arguments": {"a": 1}}, ', None),
        ("mistral", '{"name": "f", "arguments": {"a": 1}}, ', '{"name": "f", "arguments": {"a": {"b": 1, '),
        ("phi4_mini", '{"name": "f", "arguments": {"a": 1}}, ', None),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>', None),
    ],
)
def test_a_missing_bracket_swallows_no_call_that_follows(format: str, call: str, broken: str | None) -> None:
    begin = "" if call.startswith(FORMATS[format].begins) else FORMATS[format].begins[0]
    begin += "[" if "[" in FORMATS[format].glue and call.startswith("{") else ""
    text = begin + (broken or call.replace("}", "", 1)) + call + call
    for texts in ([text], list(text)):
        pieces = parse(format, texts)
        assert sum(isinstance(piece, CallName) for piece in pieces) == 3, pieces
        assert pieces[3::2] == [CallArguments(1, '{"a": 1}'), CallArguments(2, '{"a": 1}')]


SO = "<|channel|>final<|message|>So"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{SO}<|end|> it is.", "So it is."),
        (f"{SO}<|end|>\n it<|end|> is.", "So\n it is."),
        (f"{SO}<|return|> it is<|channel|>final<|message|>.", "So it is."),
        (f"{SO}<|end|><|start|>assistant", "So"),
        (f"{SO}<|end|><|start|> it is what it is.", "So it is what it is."),
        (f"{SO}<|start|>Well, it is. {SO}", "SoWell, it is. So"),
        (f"<|channel|>{'x' * 2_000}", f"<|channel|>{'x' * 2_000}"),
        (f"<|channel|>{'x' * 505}<|message|>y", f"<|channel|>{'x' * 505}<|message|>y"),
        ("<|end|>So it is.", "So it is."),
        (" t", " t"),
    ],
)
def test_harmonys_text_outside_of_messages_is_content(text: str, expected: str) -> None:
    for texts in ([text], list(text)):
        assert parse("harmony", texts) == [ContentPiece(expected)]


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_calls_beyond_those_that_can_be_sent_back_are_not_taken_for_calls(format: str) -> None:
    one = call_of(format)
    for texts in ([one * (MAX_CALLS + 2)], [one] * (MAX_CALLS + 2)):
        pieces = parse(format, texts)
        names = [piece for piece in pieces if isinstance(piece, CallName)]
        if FORMATS[format].begins or format == "harmony":
            assert len(names) == MAX_CALLS
            assert isinstance(pieces[-1], ContentPiece | ReasoningPiece)
        else:
            assert len(names) <= MAX_CALLS


@pytest.mark.parametrize(
    ("format", "text", "num_chars"),
    [
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "%s"}}</tool_call>', 150_000),
        ("hermes", '<tool_call>{"arguments": {"a": "%s"}, "name": "f"}</tool_call>', 150_000),
        ("mistral_args", '[TOOL_CALLS]f[ARGS]{"a": "%s"}', 150_000),
        ("qwen3_coder", "<tool_call><function=f><parameter=a>%s</parameter></function></tool_call>", 150_000),
        ("python", '[f(a="%s")]', MAX_PYTHON_CHARS - 10),
    ],
)
def test_long_arguments_are_a_call_in_every_form_and_can_be_sent_back(format: str, text: str, num_chars: int) -> None:
    value = "x" * num_chars
    [_, arguments] = parse(format, [text % value])
    assert isinstance(arguments, CallArguments)
    assert arguments.text == f'{{"a": "{value}"}}'
    assert ToolCall(id="1", name="f", arguments=arguments.text)


def test_what_is_too_long_to_be_sent_back_is_no_part_of_a_call() -> None:
    value = "x" * MAX_ARGUMENT_CHARS
    pieces = parse("mistral_args", [f'[TOOL_CALLS]f[ARGS]{{"a": "{value}"}} So.'])
    assert pieces == [CallName(0, "f"), CallArguments(0, '{"a": "' + value[7:]), ContentPiece('xxxxxxx"} So.')]


@pytest.mark.parametrize(
    ("format", "text", "num_chars"),
    [
        ("python", '[f(a="%s")]', MAX_PYTHON_CHARS),
        ("qwen3_coder", "<tool_call><function=f><parameter=a>%s</parameter></function></tool_call>", 2_000_000),
    ],
)
def test_what_is_too_long_to_be_converted_is_text(
    monkeypatch: pytest.MonkeyPatch, format: str, text: str, num_chars: int
) -> None:
    def refuse(*_: object, **__: object) -> None:
        pytest.fail("it was converted")

    monkeypatch.setattr("text.call_arguments.ast", SimpleNamespace(parse=refuse))
    monkeypatch.setattr("text.call_arguments.TaggedArguments.convert", refuse)
    whole = text % ("x" * num_chars)
    assert parse(format, [whole]) == [ContentPiece(whole)]


def test_the_cost_of_many_calls_in_one_push_is_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    num_read = 0
    feed = CallReader.feed

    def count(self: CallReader, text: str) -> int:
        nonlocal num_read
        num_read += len(text)
        return feed(self, text)

    monkeypatch.setattr(CallReader, "feed", count)
    for format, text in (("hermes", call_of("hermes") * 100), ("hermes", "<tool_call>{" * 2_000)):
        num_read = 0
        parse(format, [text])
        assert num_read < 50 * len(text)


@pytest.mark.parametrize(
    ("format", "begin", "part"),
    [
        ("hermes", "", " "),
        ("hermes", "<think>", "\n"),
        ("hermes", "<tool_call>", " "),
        ("mistral", "[TOOL_CALLS]", ","),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "', "x"),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": ', "["),
        ("hermes", '<tool_call>{"arguments": {"a": "', "x"),
        ("mistral_args", "[TOOL_CALLS]f[ARGS]{", "x"),
        ("qwen3_coder", "<tool_call><function=f>", "x"),
        ("python", "[f(a=", "1,"),
        ("harmony", SO, "x"),
        ("harmony", "<|channel|>", "x"),
        ("harmony", f"{SO}<|end|>", " "),
    ],
)
def test_no_text_is_copied_with_every_piece_that_arrives(format: str, begin: str, part: str) -> None:
    parser = parser_of(format)
    parser.push(begin)
    for _ in range(3_000):
        parser.push(part)
    assert max(map(len, _texts_in(parser))) < 1_000


def _texts_in(owner: object) -> Iterator[str]:
    for value in vars(owner).values():
        if isinstance(value, str):
            yield value
        elif isinstance(value, CallReader):
            yield from _texts_in(value)


WORD = re.compile(r"word\d+")

#: Words where the header of a harmony message has its names: of a role, a channel, a recipient. They are not text.
NAMES = re.compile(r"(?:assistant|final|to=functions\.f|<\|(?:start|channel|constrain)\|>)(?:\s*word\d+)+")


@given(outputs())
def test_no_word_is_lost(output: tuple[str, list[str]]) -> None:
    format, texts = output
    shown = "".join(piece.name if isinstance(piece, CallName) else piece.text for piece in parse(format, texts))
    text = "".join(texts)
    lost = set(WORD.findall(NAMES.sub("", text) if format == "harmony" else text)) - set(WORD.findall(shown))
    assert not lost
