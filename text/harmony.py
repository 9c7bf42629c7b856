"""Parses harmony, the format of GPT-OSS: messages in channels, whose markers are left in the text by the detokenizer.

    <|channel|>analysis<|message|>thoughts<|end|><|start|>assistant<|channel|>final<|message|>answer<|return|>
    <|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a": 1}<|call|>

The reference is https://cookbook.openai.com/articles/openai-harmony. The tokens that end a message may be in the text
or not. Commentary without a recipient is for the user; a call of anything but our tools is a thought.
"""

import re

from text.outputs import (
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

_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")

_RECIPIENT = re.compile(r"\bto=(?:functions\.)?([\w.-]+)")

_MAX_HEADER_CHARS = 512


class HarmonyParser(OutputParser):
    """Like OutputParser, for an output in channels. One that begins otherwise is content."""

    def __init__(
        self, *, tool_names: frozenset[str], max_calls: int | None = None, follows_grammar: bool = False
    ) -> None:
        """An output that `follows_grammar` consists of one call, or of an answer without any markers."""
        super().__init__(OutputFormat(), tool_names=tool_names, max_calls=max_calls, follows_grammar=follows_grammar)
        self._is_first = True
        self._is_plain = False  # whether the output has no channels
        self._kind: type[ContentPiece | ReasoningPiece | CallArguments] | None = None  # None: in a header

    def push(self, text: str) -> list[Piece]:
        self._held += text
        return joined(self._pieces(is_end=False))

    def finish(self, *, is_cut: bool) -> list[Piece]:
        """A header that is not complete is dropped."""
        return joined(self._pieces(is_end=True))

    def _pieces(self, *, is_end: bool) -> list[Piece]:
        pieces: list[Piece] = []
        while self._held:
            before = (self._kind, self._held)
            pieces += self._read_header(is_end=is_end) if self._kind is None else self._read_body(is_end=is_end)
            if before == (self._kind, self._held):
                break
        return pieces

    def _read_header(self, *, is_end: bool) -> list[Piece]:
        if self._is_first and not any(self._held.startswith(one) or one.startswith(self._held) for one in _FIRST):
            self._is_first, self._kind = False, ContentPiece
            self._is_plain = self._follows_grammar
            return []
        header, marker, rest = self._held.partition(_MESSAGE)
        if not marker:
            if len(header) > _MAX_HEADER_CHARS:
                self._kind = ContentPiece
            return []
        self._is_first, self._held = False, rest
        return self._begin_message(header)

    def _begin_message(self, header: str) -> list[Piece]:
        channel, recipient = _CHANNEL.search(header), _RECIPIENT.search(header)
        if recipient is not None and recipient[1] in self._tool_names:
            self._kind = CallArguments
            self.num_calls += 1
            return list(self._limited(CallName(self.num_calls - 1, recipient[1])))
        if recipient is None and channel is not None and channel[1] != "analysis":
            self._kind = ContentPiece
            return []
        is_further, self._kind = self.has_reasoning, ReasoningPiece
        self.has_reasoning = True
        return [ReasoningPiece("\n")] if is_further else []

    def _read_body(self, *, is_end: bool) -> list[Piece]:
        kind, end = self._kind, None if self._is_plain else _END.search(self._held)
        if end is not None:
            text = self._held[: end.start()]
            self._held = self._held[end.start() if end[0] == "<|channel|>" else end.end() :]
            self._kind = None
        else:
            num_kept = 0 if is_end or self._is_plain else _num_of_marker_at_the_end(self._held)
            text = self._held[: len(self._held) - num_kept]
            self._held = self._held[len(text) :]
        if kind is CallArguments:
            return list(self._limited(CallArguments(self.num_calls - 1, text)))
        return [ReasoningPiece(text) if kind is ReasoningPiece else ContentPiece(text)]


def _num_of_marker_at_the_end(text: str) -> int:
    """How many characters at the end may be the beginning of a marker."""
    longest = max(map(len, _ENDS)) - 1
    counts = range(min(longest, len(text)), 0, -1)
    return next((n for n in counts if any(one.startswith(text[len(text) - n :]) for one in _ENDS)), 0)
