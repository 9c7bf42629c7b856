"""Parses a model's text, as it arrives, into reasoning, content and tool calls.

How a model writes tool calls and reasoning is recognised by its chat template alone:

| format  | what the model writes                                               | recognised by               |
|---------|---------------------------------------------------------------------|-----------------------------|
| hermes  | <tool_call>{"name": …, "arguments": {…}}</tool_call>, repeated      | <tool_call> (Qwen, Hermes)  |
| mistral | [TOOL_CALLS][{"name": …, "arguments": {…}}, …]                      | [TOOL_CALLS]                |
| llama3  | {"name": …, "parameters": {…}}, alone, perhaps after <|python_tag|> | "parameters" and ipython    |
| harmony | <|channel|>commentary to=functions.…<|message|>{…}, see harmony.py   | <|channel|> and <|message|> |

Markers that are special tokens do not appear in the text, so mistral and llama3 calls are recognised by how the output
begins.

Part of a tag is never passed on as content. What looks like a call but turns out not to be one is content, so that no
text is lost. Once a call's name is known, its arguments are passed on as the model writes them.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from domain.requests import GenerationRequest
from domain.structured_output import ToolFormat
from text.thinking import asks_to_think

THINK, END_THINK = "<think>", "</think>"

#: Of what completes the reasoning of an output; each is looked for wherever it is.
REASONING_ENDS = (END_THINK, "<|channel|>commentary", "<|channel|>final")

#: Tokens that a text must show even if the tokenizer declares them special: without them it cannot be parsed.
MARKER_TOKENS = frozenset({THINK, END_THINK, "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"})


class ReasoningFormat(StrEnum):
    TAGGED = "tagged"  # the output may start with <think>…</think>
    CHANNELS = "channels"  # see text/harmony.py
    OPENED = "opened"  # the prompt ends in <think>, so the output starts inside


@dataclass(frozen=True, slots=True)
class OutputFormat:
    """How a model writes tool calls and reasoning; None if it does not."""

    tools: ToolFormat | None = None
    reasoning: ReasoningFormat | None = None
    #: The same where a request turns thinking off, and on; None if the template has no switch.
    reasoning_by_switch: tuple[ReasoningFormat | None, ReasoningFormat | None] | None = None

    def reasoning_of(self, request: GenerationRequest) -> ReasoningFormat | None:
        asked = asks_to_think(request)
        if asked is None or self.reasoning_by_switch is None:
            return self.reasoning
        return self.reasoning_by_switch[asked]


def output_format_of(
    template_source: str, rendered_prompt: str, switched_prompts: tuple[str, str] | None = None
) -> OutputFormat:
    """`rendered_prompt` is any prompt rendered with the template; `switched_prompts` are those with thinking turned
    off, and on."""
    reasoning = _reasoning_of(template_source, rendered_prompt)
    if switched_prompts is None:
        return OutputFormat(_tool_format_of(template_source), reasoning)
    off, on = (_reasoning_of(template_source, prompt) for prompt in switched_prompts)
    return OutputFormat(_tool_format_of(template_source), reasoning, (off, on))


def _reasoning_of(source: str, prompt: str) -> ReasoningFormat | None:
    if "<|channel|>analysis" in source:
        return ReasoningFormat.CHANNELS
    if prompt.rstrip().endswith(THINK):
        return ReasoningFormat.OPENED
    return ReasoningFormat.TAGGED if THINK in source else None


def _tool_format_of(source: str) -> ToolFormat | None:
    if "<|channel|>" in source and "<|message|>" in source:
        return ToolFormat.HARMONY
    if "tools" not in source or "<function=" in source or "[ARGS]" in source:
        return None
    if "<tool_call>" in source:
        return ToolFormat.HERMES
    if "[TOOL_CALLS]" in source:
        return ToolFormat.MISTRAL
    return ToolFormat.LLAMA3 if "ipython" in source and "parameters" in source else None


_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')

_MAX_HEAD_CHARS = 512


@dataclass(slots=True)
class ToolCallText:
    """Parses one tool call, a JSON object, as it arrives. `name` is set as soon as it is known."""

    text: str = ""
    name: str | None = None
    is_passed_on: bool = False  # whether its name was
    is_over: bool = False
    _num_scanned: int = 0
    _depth: int = 0
    _is_in_string: bool = False
    _is_escaped: bool = False
    _arguments_begin: int = -1  # set once they arrive after the name
    _num_passed_on: int = 0
    _closings: list[int] = field(default_factory=list)  # where the top-level values ended
    _whole_arguments: str | None = None  # if they came before the name

    def feed(self, text: str) -> int:
        """Read `text`; returns how much of it belongs to the call."""
        num_before = len(self.text)
        self.text += text
        end = self._scan()
        self.text = self.text[:end]
        if self.name is None and len(self.text) <= _MAX_HEAD_CHARS + len(text) and (head := _HEAD.match(self.text)):
            self.name, self._arguments_begin = json.loads(head[1]), head.end()
        if self.is_over and self.name is None:
            self._read_whole()
        return end - num_before

    def take_arguments(self) -> str:
        """The part of the arguments that has arrived since the last call."""
        if self._whole_arguments is not None:
            whole, self._whole_arguments = self._whole_arguments, ""
            return whole
        if self._arguments_begin < 0:
            return ""
        end = next((place for place in self._closings if place > self._arguments_begin), len(self.text))
        arguments = self.text[self._arguments_begin + self._num_passed_on : end]
        self._num_passed_on += len(arguments)
        return arguments

    def _scan(self) -> int:
        """The end of the object, or of the text if the object is not complete."""
        for place in range(self._num_scanned, len(self.text)):
            character = self.text[place]
            if self._is_escaped:
                self._is_escaped = False
            elif self._is_in_string:
                self._is_escaped = character == "\\"
                self._is_in_string = character != '"'
            elif character == '"':
                self._is_in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 1:
                    self._closings.append(place + 1)
                if self._depth == 0:
                    self.is_over = True
                    self._num_scanned = place + 1
                    return place + 1
        self._num_scanned = len(self.text)
        return len(self.text)

    def _read_whole(self) -> None:
        try:
            call = json.loads(self.text)
        except ValueError:
            return
        arguments = call.get("arguments", call.get("parameters")) if isinstance(call, dict) else None
        if arguments is None or not isinstance(call.get("name"), str):
            return
        self.name = call["name"]
        self._whole_arguments = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


CALL, END_CALL = "<tool_call>", "</tool_call>"

MARKERS = {ToolFormat.MISTRAL: "[TOOL_CALLS]", ToolFormat.LLAMA3: "<|python_tag|>"}

_BARE_HEAD = '{"name":'

#: A grammar writes only calls like this, with a space after the colon.
_BEGINNING_OF_CALLS = {
    ToolFormat.HERMES: CALL,
    ToolFormat.MISTRAL: '[{"name": "',
    ToolFormat.LLAMA3: '{"name": "',
}


class ContentPiece(NamedTuple):
    text: str


class ReasoningPiece(NamedTuple):
    text: str


class CallName(NamedTuple):
    """A call starts; `number` counts the calls of the output from 0."""

    number: int
    name: str


class CallArguments(NamedTuple):
    number: int
    text: str


Piece = ContentPiece | ReasoningPiece | CallName | CallArguments


class OutputParser:
    """Parses one sequence's text into pieces: `push` text, then `finish`."""

    def __init__(
        self,
        format: OutputFormat,
        *,
        tool_names: frozenset[str],
        max_calls: int | None = None,
        follows_grammar: bool = False,
    ) -> None:
        """Calls are recognised only if there are `tool_names`; those beyond `max_calls` are dropped. An output that
        `follows_grammar` either consists of calls, exactly in the form of the grammar, or contains none."""
        self._tools = format.tools if tool_names else None
        self._tool_names = tool_names
        self._max_calls = max_calls
        self._follows_grammar = follows_grammar
        self._held = ""  # text that may be the start of a tag or call
        self._call: ToolCallText | None = None
        self.num_calls = 0
        self.has_reasoning = format.reasoning is ReasoningFormat.OPENED  # even if the reasoning is empty
        starts = {
            None: self._in_content,
            ReasoningFormat.TAGGED: self._at_start,
            ReasoningFormat.OPENED: self._before_thought,
        }
        self._state = starts[format.reasoning]
        if format.reasoning is None:
            self._begin_content()

    def push(self, text: str) -> list[Piece]:
        """The pieces that are complete enough to be passed on."""
        self._held += text
        return joined(self._advance(is_end=False))

    def finish(self, *, is_cut: bool) -> list[Piece]:
        """The text that was held back. If the output was cut off (`is_cut`), part of a tag at its end is dropped."""
        pieces = self._advance(is_end=True)
        held = self._take()
        if held and not (is_cut and self._is_partial_tag(held.strip())):
            pieces.append(ReasoningPiece(held) if self._state == self._thinking else ContentPiece(held))
        if self.num_calls:
            pieces = [piece for piece in pieces if not isinstance(piece, ContentPiece) or piece.text.strip()]
        return joined(pieces)

    def _is_partial_tag(self, text: str) -> bool:
        """Whether this is the beginning of a tag. A single < counts as text, except after a call."""
        is_prefix = any(tag.startswith(text) for tag in (THINK, END_THINK, CALL, END_CALL))
        return is_prefix and (len(text) > 1 or self.num_calls > 0)

    def _advance(self, *, is_end: bool) -> list[Piece]:
        """Run the states until nothing changes any more."""
        pieces: list[Piece] = []
        while True:
            state, before = self._state, self._held
            pieces += state(is_end=is_end)
            if self._state == state and self._held == before:
                return pieces

    # The states. Each consumes from `_held` what it can classify, and may set the next state.

    def _at_start(self, *, is_end: bool) -> Iterator[Piece]:
        text = self._held.lstrip()
        if text.startswith(THINK):
            self._held = text.removeprefix(THINK)
            self.has_reasoning = True
            self._state = self._before_thought
        elif is_end or not THINK.startswith(text):
            self._begin_content()
        return iter(())

    def _before_thought(self, *, is_end: bool) -> Iterator[Piece]:
        self._held = self._held.lstrip()
        if self._held:
            self._state = self._thinking
        return iter(())

    def _thinking(self, *, is_end: bool) -> Iterator[Piece]:
        before, tag, after = self._held.partition(END_THINK)
        if tag:
            self._held = after.lstrip()
            self._state = self._after_thought
            yield ReasoningPiece(before.rstrip())
        elif not is_end:
            yield ReasoningPiece(self._release(END_THINK))

    def _after_thought(self, *, is_end: bool) -> Iterator[Piece]:
        self._held = self._held.lstrip()
        if self._held:
            self._begin_content()
        return iter(())

    def _begin_content(self) -> None:
        if self._follows_grammar and self._tools is not None:
            self._state = self._at_calls_or_answer
        else:
            self._state = self._before_bare_call if self._tools in MARKERS else self._in_content

    def _at_calls_or_answer(self, *, is_end: bool) -> Iterator[Piece]:
        """The output is either calls or an answer, and the answer may contain what would otherwise be a call: a tag
        inside a string, or the keys of a call."""
        assert self._tools is not None
        beginning = _BEGINNING_OF_CALLS[self._tools]
        if self._held.startswith(beginning):
            self._state = self._in_content if self._tools is ToolFormat.HERMES else self._before_bare_call
        elif not beginning.startswith(self._held):
            self._tools, self._state = None, self._in_content
        return iter(())

    def _in_content(self, *, is_end: bool) -> Iterator[Piece]:
        if self._tools is not ToolFormat.HERMES:
            yield ContentPiece(self._take())
            return
        before, tag, after = self._held.partition(CALL)
        if tag:
            self._held = after
            self._begin_call()
            if before.strip():
                yield ContentPiece(before.rstrip() if not self.num_calls else before.strip())
        elif not is_end:
            yield ContentPiece(self._release(CALL))

    def _before_bare_call(self, *, is_end: bool) -> Iterator[Piece]:
        """At the start of an output whose calls are JSON without a tag, or follow a marker that may not be in the
        text."""
        assert self._tools is not None
        marker = MARKERS[self._tools]
        text = self._held.lstrip()
        if not is_end and marker.startswith(text):
            return
        text = text.removeprefix(marker).lstrip()
        if self._tools is ToolFormat.MISTRAL and text.startswith("["):
            text = text[1:].lstrip()
        compact = re.sub(r"\s", "", text)[: len(_BARE_HEAD)]
        if not _BARE_HEAD.startswith(compact):
            self._state = self._in_content
        elif len(compact) == len(_BARE_HEAD):
            self._prefix, self._held = self._held[: len(self._held) - len(text)], text
            self._begin_call()
        yield from ()

    def _between_bare_calls(self, *, is_end: bool) -> Iterator[Piece]:
        """Between calls, and after the last one, there are only separators and whitespace."""
        text = self._held.lstrip(" \n\t,;]")
        self._held = text
        if text.startswith("{"):
            self._begin_call()
        elif text:
            self._state = self._in_content
        return iter(())

    def _begin_call(self) -> None:
        self._call = ToolCallText()
        self._state = self._in_call

    def _in_call(self, *, is_end: bool) -> Iterator[Piece]:
        assert self._call is not None
        call, text = self._call, self._take()
        length = call.feed(text)
        self._held = text[length:]
        if call.name is not None and not call.is_passed_on and self._is_known(call.name):
            call.is_passed_on = True
            yield from self._limited(CallName(self.num_calls, call.name))
            self.num_calls += 1
        if call.is_passed_on:
            yield from self._limited(CallArguments(self.num_calls - 1, call.take_arguments()))
        if call.is_over or is_end or self._is_broken(call):
            yield from self._end_call(call)

    def _is_known(self, name: str) -> bool:
        """With a tag any name is a call; bare JSON is a call only if it has the name of a tool."""
        return self._tools is ToolFormat.HERMES or name in self._tool_names

    def _is_broken(self, call: ToolCallText) -> bool:
        return self._tools is ToolFormat.HERMES and END_CALL in call.text and not call.is_passed_on

    def _limited(self, piece: CallName | CallArguments) -> Iterator[Piece]:
        if self._max_calls is None or piece.number < self._max_calls:
            yield piece

    def _end_call(self, call: ToolCallText) -> Iterator[Piece]:
        self._call = None
        is_tagged = self._tools is ToolFormat.HERMES
        if call.is_passed_on:
            self._state = self._after_call if is_tagged else self._between_bare_calls
            return
        self._state = self._in_content
        is_half = is_tagged and not call.is_over and END_CALL not in call.text
        if not is_half:  # a call that was cut off before its name is dropped
            yield ContentPiece((CALL if is_tagged else self._prefix) + call.text)

    def _after_call(self, *, is_end: bool) -> Iterator[Piece]:
        text = self._held.lstrip()
        if text.startswith(END_CALL):
            self._held = text.removeprefix(END_CALL)
            self._state = self._in_content
        elif is_end or not END_CALL.startswith(text):
            self._state = self._in_content
        return iter(())

    def _take(self) -> str:
        text, self._held = self._held, ""
        return text

    def _release(self, tag: str) -> str:
        """Take the held text, except whitespace and part of `tag` at its end."""
        text = self._held
        num_tag = next((n for n in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:n])), 0)
        released = text[: len(text) - num_tag].rstrip()
        self._held = text[len(released) :]
        return released

    _prefix = ""  # the text before a bare call, in case it is not a call


def joined(pieces: list[Piece]) -> list[Piece]:
    """The pieces without empty ones, and with adjacent pieces of the same kind joined."""
    whole: list[Piece] = []
    for piece in pieces:
        last = whole[-1] if whole else None
        if isinstance(piece, CallName):
            whole.append(piece)
        elif not piece.text:
            continue
        elif type(last) is type(piece) and not isinstance(last, CallName) and last is not None:
            whole[-1] = piece._replace(text=last.text + piece.text)
        else:
            whole.append(piece)
    return whole
