"""Parses harmony, the format of GPT-OSS: messages in channels, whose markers are left in the text by the detokenizer.

    <|channel|>analysis<|message|>thoughts<|end|><|start|>assistant<|channel|>final<|message|>answer<|return|>
    <|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a": 1}<|call|>

The reference is https://cookbook.openai.com/articles/openai-harmony. The tokens that end a message may be in the text
or not. Commentary without a recipient is for the user; a call of anything but our tools is a thought. Text that is in
no message is content.
"""

import re
from collections.abc import Sequence
from enum import Enum, auto

from text.call_readers import num_of_tag_at_the_end
from text.outputs import (
    MAX_CALLS,
    CallArguments,
    CallName,
    ContentPiece,
    OutputFormat,
    OutputParser,
    Piece,
    ReasoningPiece,
    joined,
)

_MESSAGE = "<|message|>"

_ENDS = ("<|start|>", "<|channel|>", "<|end|>", "<|call|>", "<|return|>")

_FIRST = ("<|channel|>", "<|start|>", _MESSAGE, " to=")  # with what an output in this format begins

_END = re.compile("|".join(map(re.escape, _ENDS)))

_END_OF_HEADER = re.compile("|".join(map(re.escape, (_MESSAGE, *(one for one in _ENDS if one != "<|channel|>")))))

#: A header, whole or cut off, with single spaces. What else is in the place of one is text.
_HEADER = re.compile(
    r" ?(?:assistant|user|system|developer|tool|functions\.[\w.-]+)?(?: ?to=[\w.-]*+)?"
    r" ?(?:<\|channel\|> ?\w*+(?: to=[\w.-]*+)?)?(?: ?<\|constrain\|>)? ?\w*+ ?"
)

_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")

_RECIPIENT = re.compile(r"\bto=(?:functions\.)?([\w.-]+)")

_MAX_HEADER_CHARS = 512  # with the marker at its end


class _Place(Enum):
    """Where the parser is, if not in a message."""

    BEGIN = auto()  # of the output, which continues a header that is part of the prompt
    BETWEEN = auto()  # messages
    HEADER = auto()


_Kind = type[ContentPiece] | type[ReasoningPiece] | type[CallArguments]


class HarmonyParser(OutputParser):
    """Like OutputParser, for an output in channels."""

    def __init__(
        self, *, tool_names: frozenset[str], max_calls: int | None = None, follows_grammar: bool = False
    ) -> None:
        """An output that `follows_grammar` consists of one call, or of an answer without any markers."""
        super().__init__(OutputFormat(), tool_names=tool_names, max_calls=max_calls, follows_grammar=follows_grammar)
        self._is_plain = False  # whether the output has no channels
        self._place: _Place | _Kind = _Place.BEGIN

    def finish(self, *, is_cut: bool) -> list[Piece]:
        """A header that is not complete is dropped."""
        self._is_cut = is_cut
        pieces = self._read_arrived() + self._advance(is_end=True)
        if self._place is _Place.HEADER and not is_cut:
            pieces += _text_of_header(self._held)
        return joined(pieces)

    def _advance(self, *, is_end: bool) -> list[Piece]:
        pieces: list[Piece] = []
        while self._held:
            before = (self._place, self._held)
            match self._place:
                case _Place.BEGIN:
                    is_text = self._begin(self._held, _FIRST, is_end=is_end)
                    self._is_plain = is_text and self._follows_grammar
                case _Place.BETWEEN:
                    self._begin(self._held.lstrip(), (*_ENDS, _MESSAGE), is_end=is_end)
                case _Place.HEADER:
                    pieces += self._read_header()
                case kind:
                    pieces += self._read_body(kind, is_end=is_end)
            if before == (self._place, self._held):
                break
        return pieces

    def _begin(self, text: str, markers: Sequence[str], *, is_end: bool) -> bool:
        """At the beginning of a message, which one of the markers tells from text that is in none. Returns whether it
        is such text."""
        marker = next((one for one in markers if text.startswith(one)), None)
        if marker is not None:
            self._held = text
            self._end_message(marker, 0)
            return False
        may_grow = not text or any(one.startswith(text) for one in markers)
        if may_grow and (not is_end or self._is_cut or not text):
            return False
        self._place = ContentPiece
        return True

    def _end_message(self, marker: str, place: int) -> None:
        """Go on behind the marker at this place, or before it if it is part of a header."""
        is_in_header = marker not in _ENDS or marker == "<|channel|>"
        self._held = self._held[place if is_in_header else place + len(marker) :]
        self._place = _Place.HEADER if is_in_header or marker == "<|start|>" else _Place.BETWEEN

    def _read_header(self) -> list[Piece]:
        end = _END_OF_HEADER.search(self._held[:_MAX_HEADER_CHARS])
        if end is None:
            if len(self._held) < _MAX_HEADER_CHARS:
                return []
            text, self._held = self._held[:_MAX_HEADER_CHARS], self._held[_MAX_HEADER_CHARS:]
            self._place = ContentPiece
            return [ContentPiece(text)]
        header = self._held[: end.start()]
        if end[0] != _MESSAGE:
            self._end_message(end[0], end.start())
            return _text_of_header(header)
        self._held = self._held[end.end() :]
        return _text_of_header(header) + self._begin_message(header)

    def _begin_message(self, header: str) -> list[Piece]:
        channel, recipient = _CHANNEL.search(header), _RECIPIENT.search(header)
        if recipient is not None and recipient[1] in self._tool_names and self.num_calls < MAX_CALLS:
            self._place = CallArguments
            self.num_calls += 1
            return list(self._limited(CallName(self.num_calls - 1, recipient[1])))
        if recipient is None and channel is not None and channel[1] != "analysis":
            self._place = ContentPiece
            return []
        is_further, self._place = self.has_reasoning, ReasoningPiece
        self.has_reasoning = True
        return [ReasoningPiece("\n")] if is_further else []

    def _read_body(self, kind: _Kind, *, is_end: bool) -> list[Piece]:
        end = None if self._is_plain else _END.search(self._held)
        if end is not None:
            text = self._held[: end.start()]
            self._end_message(end[0], end.start())
        else:
            num_kept = 0 if is_end or self._is_plain else num_of_tag_at_the_end(self._held, _ENDS)
            text = self._held[: len(self._held) - num_kept]
            self._held = self._held[len(text) :]
        if kind is CallArguments:
            return list(self._limited(CallArguments(self.num_calls - 1, text)))
        return [ReasoningPiece(text) if kind is ReasoningPiece else ContentPiece(text)]


def _text_of_header(header: str) -> list[Piece]:
    """What is before a header, or in the place of one."""
    before, marker, channel = header.partition("<|channel|>")
    if _is_header(header):
        return []
    return [ContentPiece(before if _is_header(marker + channel) else header)]


def _is_header(text: str) -> bool:
    return _HEADER.fullmatch(" ".join(text.split())) is not None
