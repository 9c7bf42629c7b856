"""Models of servers that take messages as they are: what is refused or counted, and what answers look like.

A server has taken its model's output apart, and `gpu_worker/engine/remote/chat.py` puts it together again: thoughts
between <think> and </think>, each call in JSON between <tool_call> and </tool_call>. Where the server's own text quotes
such a mark, an invisible character stands behind its "<", which is taken out when the output is shown.
"""

from collections.abc import Iterable
from typing import get_args

from domain.errors import UnsupportedParameter
from domain.requests import Effort, GenerationRequest
from text.outputs import ContentPiece, OutputFormat, OutputParser, Piece, ReasoningFormat, ReasoningPiece
from text.thinking import ThinkingControls

PASSED_ON = OutputFormat("hermes", ReasoningFormat.TAGGED, is_quoted=True)

_QUOTE = "\u2060"  # word joiner

MARKS = (f"<{_QUOTE}", "<think>", "</think>", "<tool_call>", "</tool_call>")


def quoted(text: str) -> str:
    """The text, in which no mark is one; it must have whole marks."""
    for mark in MARKS:
        text = text.replace(mark, f"<{_QUOTE}{mark[1:]}")
    return text


class PassedOnParser(OutputParser):
    """Like OutputParser, for texts that `quoted` has made."""

    _before: type[Piece] | None = None  # the kind of the last piece, if it ended in "<"

    def push(self, text: str) -> list[Piece]:
        return self._unquoted(super().push(text))

    def finish(self, *, is_cut: bool) -> list[Piece]:
        return self._unquoted(super().finish(is_cut=is_cut))

    def _unquoted(self, pieces: Iterable[Piece]) -> list[Piece]:
        return [
            self._unquoted_piece(piece) if isinstance(piece, ContentPiece | ReasoningPiece) else piece
            for piece in pieces
        ]

    def _unquoted_piece(self, piece: ContentPiece | ReasoningPiece) -> ContentPiece | ReasoningPiece:
        text = piece.text
        if self._before is type(piece):
            text = text.removeprefix(_QUOTE)
        self._before = type(piece) if text.endswith("<") else None
        return piece._replace(text=text.replace(f"<{_QUOTE}", "<"))


EVERY_EFFORT = ThinkingControls(has_level=True, words=frozenset(get_args(Effort)))


def text_to_count(request: GenerationRequest, model_id: str) -> str:
    """A text about as long as the prompt that the server will make. Raises UnsupportedParameter."""
    if request.messages is None or request.continue_final_message:
        raise UnsupportedParameter(
            f"{model_id} runs on a server that takes only whole messages; end with a message of the user",
            param="messages" if request.messages is not None else request.source,
        )
    if request.chat_template_kwargs:
        raise UnsupportedParameter(
            f"{model_id} runs on a server with a chat template of its own; leave out chat_template_kwargs",
            param="chat_template_kwargs",
        )
    texts = [message.content for message in request.messages]
    texts += [call.arguments for message in request.messages for call in message.tool_calls]
    texts += [tool.model_dump_json(exclude_none=True) for tool in request.tools]
    return "\n".join(texts)
