"""The output of a response as its text arrives: its items, and its stream events.

Both are derived only from the job's chunks. So a stream that is read again has the same events with the same numbers,
and a client that resumes it gets each of them exactly once.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from uuid import UUID

from dialects.openai_views import TokenLogprobView, content_logprobs
from domain.jobs import external_id
from domain.requests import TokenLogprob
from text.outputs import CallArguments, CallName, ContentPiece, OutputParser, Piece, ReasoningPiece

OutputItem = dict[str, Any]

ResponseEvent = dict[str, Any]  # with its `type`, without its `sequence_number`


class ResponseOutput:
    """Builds a response's items and events: `push` a job's text in order, then `finish`. `items` are those so far."""

    def __init__(self, job_id: UUID, parser: OutputParser) -> None:
        self._items: list[OutputItem] = []
        self._texts: list[str] = []  # what the last item has gained since its text was last joined
        self._ulid = external_id(job_id, "resp").removeprefix("resp_")
        self.parser = parser
        self._is_open = False  # whether the last item may still grow

    @property
    def items(self) -> list[OutputItem]:
        if self._texts:
            item = self._items[-1]
            owner, field = (item, "arguments") if item["type"] == "function_call" else (item["content"][0], "text")
            owner[field] += "".join(self._texts)
            self._texts.clear()
        return self._items

    def push(self, text: str, logprobs: Sequence[TokenLogprob] | None = None) -> Iterator[ResponseEvent]:
        """`logprobs` are attached to the first visible text of their chunk."""
        tokens = content_logprobs(logprobs or ())
        for piece in self.parser.push(text):
            yield from self._grow(piece, tokens)
            tokens = [] if isinstance(piece, ContentPiece) else tokens
        if tokens and self._is_open and self._items[-1]["type"] == "message":
            yield from self._grow(ContentPiece(""), tokens)

    def finish(self, status: str) -> Iterator[ResponseEvent]:
        """The text has ended; `status` is `completed` or `incomplete`. A completed text is a message, even if empty."""
        for piece in self.parser.finish(is_cut=status != "completed"):
            yield from self._grow(piece, [])
        if not self._items and status == "completed":
            yield from self._open(self._new_message())
        yield from self._close(status)

    def _grow(self, piece: Piece, tokens: Sequence[TokenLogprobView]) -> Iterator[ResponseEvent]:
        match piece:
            case ContentPiece(text):
                yield from self._continue("message", self._new_message)
                yield self._add_text(text, tokens)
            case ReasoningPiece(text):
                yield from self._continue("reasoning", self._new_reasoning)
                yield self._add_thought(text)
            case CallName(_, name):
                yield from self._open(self._new_call(name))
            case CallArguments(_, text):
                yield self._add_arguments(text)

    def _continue(self, kind: str, new: "Any") -> Iterator[ResponseEvent]:
        if not (self._is_open and self._items[-1]["type"] == kind):
            yield from self._open(new())

    def _open(self, item: OutputItem) -> Iterator[ResponseEvent]:
        """Open an item, which completes the one before it."""
        yield from self._close("completed")
        self._items.append(item)
        self._is_open = True
        begun = item | ({"content": []} if "content" in item else {})
        yield {"type": "response.output_item.added", "output_index": self._index, "item": begun}
        if "content" in item:
            yield self._about_part("response.content_part.added", part=_empty(item["content"][0]))

    def _close(self, status: str) -> Iterator[ResponseEvent]:
        if not self._is_open:
            return
        self._is_open = False
        item = self.items[-1]
        item["status"] = status
        if item["type"] == "function_call":
            arguments = {"name": item["name"], "arguments": item["arguments"]}
            yield self._about_item("response.function_call_arguments.done", **arguments)
        else:
            part = item["content"][0]
            is_text = part["type"] == "output_text"
            done = "response.output_text.done" if is_text else "response.reasoning_text.done"
            logprobs = {"logprobs": part["logprobs"]} if is_text else {}
            yield self._about_part(done, text=part["text"], **logprobs)
            yield self._about_part("response.content_part.done", part=dict(part))
        yield {"type": "response.output_item.done", "output_index": self._index, "item": dict(item)}

    def _add_text(self, text: str, tokens: Sequence[TokenLogprobView]) -> ResponseEvent:
        self._texts.append(text)
        self._items[-1]["content"][0]["logprobs"] += tokens
        return self._about_part("response.output_text.delta", delta=text, logprobs=tokens)

    def _add_thought(self, text: str) -> ResponseEvent:
        self._texts.append(text)
        return self._about_part("response.reasoning_text.delta", delta=text)

    def _add_arguments(self, text: str) -> ResponseEvent:
        self._texts.append(text)
        return self._about_item("response.function_call_arguments.delta", delta=text)

    @property
    def _index(self) -> int:
        return len(self._items) - 1

    def _about_item(self, kind: str, **fields: object) -> ResponseEvent:
        return {"type": kind, "item_id": self._items[-1]["id"], "output_index": self._index, **fields}

    def _about_part(self, kind: str, **fields: object) -> ResponseEvent:
        return self._about_item(kind, content_index=0, **fields)

    def _new_id(self, prefix: str) -> str:
        return f"{prefix}_{self._ulid}_{len(self._items)}"

    def _new_message(self) -> OutputItem:
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        head = {"id": self._new_id("msg"), "type": "message", "role": "assistant", "status": "in_progress"}
        return head | {"content": [part]}

    def _new_reasoning(self) -> OutputItem:
        part = {"type": "reasoning_text", "text": ""}
        head = {"id": self._new_id("rs"), "type": "reasoning", "status": "in_progress"}
        return head | {"summary": [], "content": [part]}

    def _new_call(self, name: str) -> OutputItem:
        ids = {"id": self._new_id("fc"), "call_id": self._new_id("call")}
        return ids | {"type": "function_call", "status": "in_progress", "name": name, "arguments": ""}


def _empty(part: Mapping[str, Any]) -> dict[str, Any]:
    """The part as it begins, apart from what grows."""
    return {name: [] if isinstance(value, list) else value for name, value in part.items()}
