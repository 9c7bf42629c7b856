"""Parses a model's text, as it arrives, into reasoning, content and tool calls.

How a model writes them is recognised by its chat template alone: calls by `text/call_formats.py`, reasoning by the tags
that the template mentions. Markers that are special tokens may be missing from the text, so calls in some formats are
also recognised by how the output begins.

Part of a tag is never passed on as content. What looks like a call but turns out not to be one is content, so that no
text is lost. Once a call's name is known, its arguments are passed on as the model writes them, if that is in JSON.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby
from types import MappingProxyType
from typing import Any, NamedTuple

from domain.requests import GenerationRequest
from domain.structured_output import MAX_TOOLS, TOOL_NAME
from text.call_formats import MARKERS, call_format, format_of_template
from text.call_readers import MAX_HEAD_CHARS, CallReader, num_of_tag_at_the_end
from text.thinking import asks_to_think

THINK, END_THINK = "<think>", "</think>"

#: The tags around reasoning: of most models, of Magistral, and of Command.
THINK_TAGS = ((THINK, END_THINK), ("[THINK]", "[/THINK]"), ("<|START_THINKING|>", "<|END_THINKING|>"))

#: Of what completes the reasoning of an output; each is looked for wherever it is.
REASONING_ENDS = (*(end for _, end in THINK_TAGS), "<|channel|>commentary", "<|channel|>final")

#: Tokens that a text must show even if the tokenizer declares them special: without them it cannot be parsed.
MARKER_TOKENS = MARKERS.union(*THINK_TAGS)


class ReasoningFormat(StrEnum):
    TAGGED = "tagged"  # the output may start with <think>…</think>
    CHANNELS = "channels"  # see text/harmony.py
    OPENED = "opened"  # the prompt ends in <think>, so the output starts inside


@dataclass(frozen=True, slots=True)
class OutputFormat:
    """How a model writes tool calls (the name of a `CallFormat`) and reasoning; None if it does not."""

    tools: str | None = None
    reasoning: ReasoningFormat | None = None
    #: The same where a request turns thinking off, and on; None if the template has no switch.
    reasoning_by_switch: tuple[ReasoningFormat | None, ReasoningFormat | None] | None = None
    think_tags: tuple[str, str] = THINK_TAGS[0]
    is_quoted: bool = False  # see text/passed_on.py

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
    calls = format_of_template(template_source)
    tags = next((tags for tags in THINK_TAGS if tags[0] in template_source), THINK_TAGS[0])
    by_switch = None
    if switched_prompts is not None:
        off, on = (_reasoning_of(template_source, prompt, tags[0]) for prompt in switched_prompts)
        by_switch = (off, on)
    reasoning = _reasoning_of(template_source, rendered_prompt, tags[0])
    return OutputFormat(None if calls is None else calls.name, reasoning, by_switch, tags)


def _reasoning_of(source: str, prompt: str, tag: str) -> ReasoningFormat | None:
    if "<|channel|>analysis" in source:
        return ReasoningFormat.CHANNELS
    if prompt.rstrip().endswith(tag):
        return ReasoningFormat.OPENED
    return ReasoningFormat.TAGGED if tag in source else None


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


MAX_CALLS = MAX_TOOLS  # of an output: as many as a message may have; calls behind them are text

_SLICE_CHARS = 256

NO_PARAMETERS: Mapping[str, Any] = MappingProxyType({})


class OutputParser:
    """Parses one sequence's text into pieces: `push` text, then `finish`."""

    def __init__(
        self,
        format: OutputFormat,
        *,
        tool_names: frozenset[str],
        parameters: Mapping[str, Any] = NO_PARAMETERS,
        max_calls: int | None = None,
        follows_grammar: bool = False,
    ) -> None:
        """Calls are recognised only if there are `tool_names`; `parameters` are the schemas of their arguments. Calls
        beyond `max_calls` are dropped. An output that `follows_grammar` either consists of calls, exactly in the form
        of the grammar, or contains none."""
        self._calls = call_format(format.tools) if tool_names and format.tools is not None else None
        self._tool_names = tool_names
        self._parameters = parameters
        self._max_calls = max_calls
        self._follows_grammar = follows_grammar
        self._think, self._end_think = format.think_tags
        self._arrived: list[str] = []  # blanks that nothing has followed yet
        self._held = ""  # text that may be the start of a tag or call
        self._call: CallReader | None = None
        self._passed: list[str] = []  # what was consumed since the last call or content, in case that no call follows
        self._num_in_section = 0  # calls since the last marker with which calls begin
        self._has_marker = False  # whether there was such a marker
        self._is_cut = False
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
        """The pieces that are complete enough to be passed on. The cost is linear in the length of the output: a long
        text is read in slices, since each step may copy what is held; and blanks wait for what follows, since it
        decides whether they are shown."""
        pieces: list[Piece] = []
        for start in range(0, len(text), _SLICE_CHARS):
            part = text[start : start + _SLICE_CHARS]
            self._arrived.append(part)
            if not part.isspace():
                pieces += self._read_arrived()
        return joined(pieces)

    def _read_arrived(self) -> list[Piece]:
        self._held += "".join(self._arrived)
        self._arrived.clear()
        return self._advance(is_end=False)

    def finish(self, *, is_cut: bool) -> list[Piece]:
        """The text that was held back. If the output was cut off (`is_cut`), part of a tag at its end is dropped."""
        self._is_cut = is_cut
        pieces = self._read_arrived() + self._advance(is_end=True)
        held = self._take()
        if held and not (is_cut and self._is_partial_tag(held.strip())):
            pieces.append(ReasoningPiece(held) if self._state == self._thinking else ContentPiece(held))
        if self.num_calls:
            pieces = [piece for piece in pieces if not isinstance(piece, ContentPiece) or piece.text.strip()]
        return joined(pieces)

    def _is_partial_tag(self, text: str) -> bool:
        """Whether this is the beginning of a tag. A single character counts as text, except after a call."""
        tags = [self._think, self._end_think, *(self._calls.begins + self._calls.ends if self._calls else ())]
        return any(tag.startswith(text) for tag in tags) and (len(text) > 1 or self.num_calls > 0)

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
        if text.startswith(self._think):
            self._held = text.removeprefix(self._think)
            self.has_reasoning = True
            self._state = self._before_thought
        elif is_end or not self._think.startswith(text):
            self._begin_content()
        return iter(())

    def _before_thought(self, *, is_end: bool) -> Iterator[Piece]:
        self._held = self._held.lstrip()
        if self._held:
            self._state = self._thinking
        return iter(())

    def _thinking(self, *, is_end: bool) -> Iterator[Piece]:
        before, tag, after = self._held.partition(self._end_think)
        if tag:
            self._held = after.lstrip()
            self._state = self._after_thought
            yield ReasoningPiece(before.rstrip())
        elif not is_end:
            yield ReasoningPiece(self._release(self._end_think))

    def _after_thought(self, *, is_end: bool) -> Iterator[Piece]:
        self._held = self._held.lstrip()
        if self._held:
            self._begin_content()
        return iter(())

    def _begin_content(self) -> None:
        if self._calls is None:
            self._state = self._in_content
        elif self._follows_grammar:
            self._state = self._at_calls_or_answer
        else:
            self._state = self._in_content if self._calls.is_bare is None else self._at_bare_call

    def _at_calls_or_answer(self, *, is_end: bool) -> Iterator[Piece]:
        """The output is either calls or an answer, and the answer may contain what would otherwise be a call: a tag
        inside a string, or the keys of a call."""
        assert self._calls is not None
        beginnings = self._calls.beginnings(self._tool_names)
        if any(self._held.startswith(beginning) for beginning in beginnings):
            self._state = self._in_content if self._calls.is_bare is None else self._at_bare_call
        elif not any(beginning.startswith(self._held) for beginning in beginnings):
            self._calls, self._state = None, self._in_content
        return iter(())

    def _in_content(self, *, is_end: bool) -> Iterator[Piece]:
        begins = () if self._calls is None else self._calls.begins
        places = [(place, begin) for begin in begins if (place := self._held.find(begin)) >= 0]
        if places:
            place, begin = min(places)
            content = self._held[:place].rstrip()
            self._passed = [self._held[len(content) : place + len(begin)]]
            self._held = self._held[place + len(begin) :]
            self._begin_section(has_marker=True)
            yield ContentPiece(content)
        elif not is_end or not begins:
            yield ContentPiece(self._release(*begins) if begins else self._take())

    def _at_bare_call(self, *, is_end: bool) -> Iterator[Piece]:
        """At the start of an output whose calls may come without a marker."""
        assert self._calls is not None
        assert self._calls.is_bare is not None
        text = self._held.lstrip()
        if not is_end and any(begin.startswith(text) for begin in self._calls.begins):
            return iter(())
        is_bare = False if text.startswith(self._calls.begins) else self._calls.is_bare(text)
        if is_bare:
            self._passed, self._held = [self._held[: len(self._held) - len(text)]], text
            self._begin_section(has_marker=False)
        elif is_bare is False:
            self._state = self._in_content
        return iter(())

    def _begin_section(self, *, has_marker: bool) -> None:
        self._has_marker = has_marker
        self._num_in_section = 0
        self._state = self._between_calls

    def _between_calls(self, *, is_end: bool) -> Iterator[Piece]:
        """Before, between and behind the calls of a section, where there are only blanks, glue and markers."""
        assert self._calls is not None
        calls = self._calls
        marks = (*calls.glue, *calls.ends, *(calls.begins if self._num_in_section else ()))
        text = self._held.lstrip()
        mark = max((mark for mark in marks if text.startswith(mark)), key=len, default="")
        may_grow = not is_end and any(mark.startswith(text) and mark != text for mark in marks)
        if may_grow:
            return
        if mark:
            self._pass(len(self._held) - len(text) + len(mark))
            if mark in calls.begins:
                self._num_in_section = 0
            elif mark in calls.ends:
                yield from self._end_section()
        elif text or is_end:
            if text and (calls.is_list or not self._num_in_section) and self.num_calls < MAX_CALLS:
                self._pass(len(self._held) - len(text))
                self._call = calls.reader(text[0], self._parameters, calls.stops)
                self._state = self._in_call
            else:
                yield from self._end_section()

    def _pass(self, num_chars: int) -> None:
        self._passed.append(self._held[:num_chars])
        self._held = self._held[num_chars:]

    def _end_section(self) -> Iterator[Piece]:
        """What was passed is dropped behind a call, and is content if there was none."""
        passed = self._take_passed()
        self._state = self._after_calls if self._num_in_section else self._in_content
        if not self._num_in_section and not self._is_cut:
            yield ContentPiece(passed)

    def _take_passed(self) -> str:
        passed, self._passed = "".join(self._passed), []
        return passed

    def _after_calls(self, *, is_end: bool) -> Iterator[Piece]:
        self._held = self._held.lstrip()
        if self._held:
            self._state = self._in_content
        return iter(())

    def _in_call(self, *, is_end: bool) -> Iterator[Piece]:
        assert self._call is not None
        call, text = self._call, self._held
        num_kept = 0 if is_end else num_of_tag_at_the_end(text, call.stops)
        self._held = text[call.feed(text[: len(text) - num_kept]) :]
        if call.name is not None and not call.is_passed_on and self._is_known(call.name):
            call.is_passed_on = True
            yield from self._limited(CallName(self.num_calls, call.name))
            self.num_calls += 1
        if call.is_passed_on:
            yield from self._limited(CallArguments(self.num_calls - 1, call.take_arguments()))
        if call.is_over or call.is_broken or is_end:
            yield from self._end_call(call)

    def _is_known(self, name: str) -> bool:
        """Behind a marker any name that a tool may have is a call; without one a call has the name of a tool."""
        return name in self._tool_names or (self._has_marker and TOOL_NAME.fullmatch(name) is not None)

    def _limited(self, piece: CallName | CallArguments) -> Iterator[Piece]:
        if self._max_calls is None or piece.number < self._max_calls:
            yield piece

    def _end_call(self, call: CallReader) -> Iterator[Piece]:
        self._call = None
        passed = self._take_passed()
        if call.is_passed_on:
            self._num_in_section += 1
            self._state = self._between_calls
            return
        self._state = self._in_content
        is_half = self._is_cut and self._has_marker and not call.is_over and call.num_chars <= MAX_HEAD_CHARS
        if not is_half:  # a call that was cut off before its name is dropped
            yield ContentPiece(passed + call.text)

    def _take(self) -> str:
        text, self._held = self._held, ""
        return text

    def _release(self, *tags: str) -> str:
        """Take the held text, except whitespace and part of a tag at its end."""
        text = self._held
        released = text[: len(text) - num_of_tag_at_the_end(text, tags)].rstrip()
        self._held = text[len(released) :]
        return released


def joined(pieces: Iterable[Piece]) -> list[Piece]:
    """The pieces without empty ones, and with adjacent pieces of the same kind joined."""
    whole: list[Piece] = []
    for _, same in groupby((piece for piece in pieces if isinstance(piece, CallName) or piece.text), key=type):
        first, *others = same
        if isinstance(first, CallName):
            whole += [first, *others]
        else:
            texts = [piece.text for piece in others if not isinstance(piece, CallName)]
            whole.append(first._replace(text="".join([first.text, *texts])))
    return whole
