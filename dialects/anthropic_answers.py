"""Anthropic's Messages: a job's output as one message or as a stream of events.

Whole messages and streams use the same parser, so they agree. The events and their order are those of
https://platform.claude.com/docs/en/build-with-claude/streaming.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal, NotRequired, Protocol
from uuid import UUID

from pydantic_core import from_json

from dialects.anthropic_requests import MessagesBody
from dialects.openai_views import ModelCardView, StreamedJob, Timestamp, View, count_reasoning_tokens, page, timestamp
from domain.jobs import BATCH_PRIORITY, FinishReason, Usage, external_id
from domain.requests import GenerationRequest, GenerationResult, ResultChoice, TokenChunk
from storage.job_queries import JobRecord
from text.outputs import CallArguments, CallName, ContentPiece, OutputFormat, OutputParser, Piece, ReasoningPiece
from text.parsers import parser_of

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]


class ContentBlockView(View):
    """A block of one type, with the fields that Anthropic's reference gives that type."""

    type: Literal["text", "thinking", "tool_use"]
    text: NotRequired[str]
    thinking: NotRequired[str]
    signature: NotRequired[str]
    id: NotRequired[str]
    name: NotRequired[str]
    input: NotRequired[dict[str, Any]]


class ThinkingTokensView(View):
    thinking_tokens: int


class MessageUsageView(View):
    """`input_tokens` counts the prompt tokens that were computed, without those read from the cache."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: ThinkingTokensView
    service_tier: Literal["standard", "priority", "batch"]


class MessageHeadView(View):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str


class MessageView(MessageHeadView):
    content: list[ContentBlockView]
    stop_reason: StopReason | None
    stop_sequence: str | None
    stop_details: None  # for refusals, which do not exist here
    usage: MessageUsageView


class TokenCountView(View):
    input_tokens: int


class AnthropicModelView(View):
    type: Literal["model"]
    id: str
    display_name: str
    created_at: Timestamp
    lifecycle: Literal["active"]
    max_input_tokens: int | None
    max_tokens: int | None


class AnthropicModelListView(View):
    data: list[AnthropicModelView]
    first_id: str | None
    last_id: str | None
    has_more: bool


class StreamedMessageJob(StreamedJob, Protocol):
    @property
    def num_prompt_tokens(self) -> int: ...


PING: Mapping[str, object] = {"type": "ping"}


def from_result(record: JobRecord, request: GenerationRequest, body: MessagesBody, format: OutputFormat) -> MessageView:
    """The message of a completed job. `request` is the job's request; `format` is the model's."""
    result = record.result
    assert isinstance(result, GenerationResult)
    [choice] = result.choices
    parser = parser_of(request, format)
    pieces = parser.push(choice.text) + parser.finish(is_cut=choice.finish_reason is not FinishReason.STOP)
    return {
        **_head(record.job.id, record.job.model_name),
        "content": _content(record.job.id, pieces, body),
        "stop_reason": _stop_reason(choice, parser, body),
        "stop_sequence": choice.stop_string,
        "stop_details": None,
        "usage": _usage(result, parser, record.job.priority),
    }


class MessageStream:
    """Makes the events of a message from a job's chunks. Only the last block can be open."""

    def __init__(
        self, job: StreamedMessageJob, request: GenerationRequest, body: MessagesBody, format: OutputFormat
    ) -> None:
        self._job = job
        self._body = body
        self._parser = parser_of(request, format)
        self._num_blocks = 0
        self._open: type[Piece] | None = None  # what began the last block, while that is open

    def begin(self) -> Iterable[Mapping[str, object]]:
        usage = Usage(prompt_tokens=self._job.num_prompt_tokens)
        message: Mapping[str, object] = {
            **_head(self._job.job_id, self._job.model_name),
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "stop_details": None,
            "usage": _usage_object(usage, num_thinking_tokens=0, priority=self._job.priority),
        }
        yield {"type": "message_start", "message": message}

    def from_chunk(self, chunk: TokenChunk) -> Iterable[Mapping[str, object]]:
        pieces = self._parser.push(chunk.text)
        if chunk.finish_reason is not None:
            pieces += self._parser.finish(is_cut=chunk.finish_reason is not FinishReason.STOP)
        for piece in pieces:
            yield from self._events_of(piece)
        if chunk.finish_reason is not None:
            yield from self._close()

    def finish(self, record: JobRecord) -> Iterable[Mapping[str, object]]:
        assert isinstance(record.result, GenerationResult)
        [choice] = record.result.choices
        usage = _usage(record.result, self._parser, record.job.priority)
        delta = {
            "stop_reason": _stop_reason(choice, self._parser, self._body),
            "stop_sequence": choice.stop_string,
            "stop_details": None,
        }
        told = {name: value for name, value in usage.items() if name != "service_tier"}
        yield {"type": "message_delta", "delta": delta, "usage": told}
        yield {"type": "message_stop"}

    def _events_of(self, piece: Piece) -> Iterable[Mapping[str, object]]:
        if isinstance(piece, ReasoningPiece) and not self._body.shows_thinking:
            return
        if isinstance(piece, CallName):
            yield from self._begin(CallName, _empty_block(self._job.job_id, piece))
            return
        if self._open is not (CallName if isinstance(piece, CallArguments) else type(piece)):
            yield from self._begin(type(piece), _empty_block(self._job.job_id, piece))
        delta = _delta(piece, self._body)
        if delta is not None:
            yield {"type": "content_block_delta", "index": self._num_blocks - 1, "delta": delta}

    def _begin(self, kind: type[Piece], block: ContentBlockView) -> Iterable[Mapping[str, object]]:
        yield from self._close()
        self._open = kind
        self._num_blocks += 1
        yield {"type": "content_block_start", "index": self._num_blocks - 1, "content_block": block}
        if self._num_blocks == 1:
            yield PING

    def _close(self) -> Iterable[Mapping[str, object]]:
        if self._open is ReasoningPiece:
            delta = {"type": "signature_delta", "signature": _signature(self._job.job_id)}
            yield {"type": "content_block_delta", "index": self._num_blocks - 1, "delta": delta}
        if self._open is not None:
            yield {"type": "content_block_stop", "index": self._num_blocks - 1}
        self._open = None


def model_object(card: ModelCardView) -> AnthropicModelView:
    return {
        "type": "model",
        "id": card["id"],
        "display_name": card["id"],
        "created_at": timestamp(datetime.fromtimestamp(card["created"], UTC)),
        "lifecycle": "active",
        "max_input_tokens": card["max_model_len"],
        "max_tokens": card["max_model_len"],
    }


def anthropic_page(data: Sequence[Mapping[str, Any]], limit: int) -> dict[str, Any]:
    """Like `page`, in the form of Anthropic's lists."""
    return {name: value for name, value in page(data, limit).items() if name != "object"}


def _head(job_id: UUID, model: str) -> MessageHeadView:
    return {"id": external_id(job_id, "msg"), "type": "message", "role": "assistant", "model": model}


def _content(job_id: UUID, pieces: Sequence[Piece], body: MessagesBody) -> list[ContentBlockView]:
    """The content blocks. Consecutive pieces of one kind become one block, as in a stream."""
    blocks: list[ContentBlockView] = []
    for place, piece in enumerate(pieces):
        if isinstance(piece, CallName):
            following = (one for one in pieces[place:] if isinstance(one, CallArguments) and one.number == piece.number)
            blocks.append({**_empty_block(job_id, piece), "input": _input("".join(one.text for one in following))})
        elif isinstance(piece, ContentPiece):
            if not blocks or blocks[-1]["type"] != "text":
                blocks.append(_empty_block(job_id, piece))
            blocks[-1]["text"] += piece.text
        elif isinstance(piece, ReasoningPiece) and body.shows_thinking:
            if not blocks:
                blocks.append({**_empty_block(job_id, piece), "signature": _signature(job_id)})
            blocks[-1]["thinking"] += "" if _is_omitted(body) else piece.text
    return blocks


def _input(arguments: str) -> dict[str, Any]:
    """The arguments of a call. If it was cut off, as much of them as the SDK would read from a stream."""
    try:
        value = from_json(arguments, allow_partial=True)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _empty_block(job_id: UUID, piece: Piece) -> ContentBlockView:
    if isinstance(piece, ContentPiece):
        return {"type": "text", "text": ""}
    if isinstance(piece, ReasoningPiece):
        return {"type": "thinking", "thinking": "", "signature": ""}
    assert isinstance(piece, CallName)
    return {"type": "tool_use", "id": _call_id(job_id, piece.number), "name": piece.name, "input": {}}


def _delta(piece: Piece, body: MessagesBody) -> Mapping[str, str] | None:
    if isinstance(piece, ContentPiece):
        return {"type": "text_delta", "text": piece.text}
    if isinstance(piece, ReasoningPiece):
        return None if _is_omitted(body) else {"type": "thinking_delta", "thinking": piece.text}
    assert isinstance(piece, CallArguments)
    return {"type": "input_json_delta", "partial_json": piece.text}


def _is_omitted(body: MessagesBody) -> bool:
    return body.thinking is not None and body.thinking.display == "omitted"


def _call_id(job_id: UUID, number: int) -> str:
    """The same whenever this output is read."""
    return f"toolu_{_digest(job_id, number)}"


def _signature(job_id: UUID) -> str:
    """Clients send it back with the thoughts. Nobody checks it, since their origin does not matter here."""
    return _digest(job_id, "thinking")


def _digest(*parts: object) -> str:
    return hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()[:24]


def _stop_reason(choice: ResultChoice, parser: OutputParser, body: MessagesBody) -> StopReason:
    """`tool_use` only if the model ended the output itself, since a call that was cut off must not be executed."""
    if choice.finish_reason is FinishReason.LENGTH:
        return "max_tokens" if choice.num_tokens >= body.max_tokens else "model_context_window_exceeded"
    if choice.stop_string is not None:
        return "stop_sequence"
    return "tool_use" if parser.num_calls else "end_turn"


def _usage(result: GenerationResult, parser: OutputParser, priority: int) -> MessageUsageView:
    """`parser` must have consumed all the text."""
    num_thinking_tokens = count_reasoning_tokens(result.choices, [parser])
    return _usage_object(result.usage, num_thinking_tokens=num_thinking_tokens, priority=priority)


def _usage_object(usage: Usage, *, num_thinking_tokens: int, priority: int) -> MessageUsageView:
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"thinking_tokens": num_thinking_tokens},
        "service_tier": "batch" if priority <= BATCH_PRIORITY else "priority" if priority > 0 else "standard",
    }
