"""A job's output as chat completions: the message, or its deltas, with tool calls and reasoning taken out of the text.

Whole answers and streams go through the same parser, so they agree.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from uuid import UUID

from api.openai.output_parsing import (
    CallArguments,
    CallName,
    ContentPiece,
    OutputParser,
    Piece,
    ReasoningPiece,
    parser_of,
)
from api.openai.running import Run
from api.openai.schemas import FINISH_REASONS, content_logprobs, tier_of
from api.openai.usage import count_reasoning_tokens, usage_object
from domain.chunks import TokenChunk, TokenLogprob
from domain.ids import external_id
from domain.jobs import FinishReason
from domain.requests import GenerationRequest, GenerationResult, ResultChoice
from storage.job_queries import JobRecord
from storage.tables import Job
from tasks.output_formats import OutputFormat


def from_result(
    record: JobRecord, request: GenerationRequest, format: OutputFormat, service_tier: str | None = None
) -> dict[str, object]:
    """The chat completion of a completed job. `request` is what was asked for; `format` is the model's."""
    result = record.result
    assert isinstance(result, GenerationResult)
    parsers = [parser_of(request, format) for _ in range(request.params.n)]
    return _head(record.job.id, record.job, "chat.completion", service_tier) | {
        "choices": [_choice(record.job.id, choice, parsers[choice.index]) for choice in result.choices],
        "usage": _usage(result, parsers),
    }


class ChatStream:
    """A job's chunks as chat completion chunks."""

    def __init__(
        self,
        run: Run,
        request: GenerationRequest,
        format: OutputFormat,
        *,
        has_usage: bool,
        service_tier: str | None,
    ) -> None:
        self._job_id = run.job_id
        self._head = _head(run.job_id, run, "chat.completion.chunk", service_tier)
        self._parsers = [parser_of(request, format) for _ in range(request.params.n)]
        self._has_usage = has_usage

    def begin(self) -> Iterable[Mapping[str, object]]:
        for index in range(len(self._parsers)):
            yield self._chunk(index, {"role": "assistant", "content": "", "refusal": None})

    def from_chunk(self, chunk: TokenChunk) -> Iterable[Mapping[str, object]]:
        """The text first, its reason to end in an event of its own. A reason that clients do not know is left to the
        error that follows."""
        parser = self._parsers[chunk.index]
        pieces = parser.push(chunk.text)
        if chunk.finish_reason is not None:
            pieces += parser.finish(is_cut=chunk.finish_reason is not FinishReason.STOP)
        deltas = [_delta(self._job_id, chunk.index, piece) for piece in pieces]
        if chunk.logprobs and not deltas:
            deltas = [{"content": ""}]
        for number, delta in enumerate(deltas):
            yield self._chunk(chunk.index, delta, logprobs=_logprobs(chunk.logprobs) if number == 0 else None)
        if chunk.finish_reason in FINISH_REASONS:
            yield self._chunk(chunk.index, {}, finish_reason=_finish_reason(chunk.finish_reason, parser))

    def finish(self, record: JobRecord) -> Iterable[Mapping[str, object]]:
        assert isinstance(record.result, GenerationResult)
        if self._has_usage:
            yield self._head | {"choices": [], "usage": _usage(record.result, self._parsers)}

    def _chunk(
        self, index: int, delta: Mapping[str, object], *, logprobs: object = None, finish_reason: str | None = None
    ) -> dict[str, object]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        chunk = self._head | {"choices": [choice]}
        return chunk | {"usage": None} if self._has_usage else chunk


def _usage(result: GenerationResult, parsers: Sequence[OutputParser]) -> dict[str, object]:
    """`parsers` have taken all the text."""
    return usage_object(result.usage, num_reasoning_tokens=count_reasoning_tokens(result.choices, parsers))


def _choice(job_id: UUID, choice: ResultChoice, parser: OutputParser) -> dict[str, object]:
    pieces = parser.push(choice.text) + parser.finish(is_cut=choice.finish_reason is not FinishReason.STOP)
    content = "".join(piece.text for piece in pieces if isinstance(piece, ContentPiece))
    reasoning = "".join(piece.text for piece in pieces if isinstance(piece, ReasoningPiece))
    calls = _calls(job_id, choice.index, pieces)
    message: dict[str, object] = {"role": "assistant", "content": content or (None if calls else ""), "refusal": None}
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls
    return {
        "index": choice.index,
        "message": message,
        "logprobs": _logprobs(choice.logprobs),
        "finish_reason": _finish_reason(choice.finish_reason, parser),
    }


def _calls(job_id: UUID, index: int, pieces: Sequence[Piece]) -> list[dict[str, object]]:
    names = [piece for piece in pieces if isinstance(piece, CallName)]
    arguments = [piece for piece in pieces if isinstance(piece, CallArguments)]
    return [
        {
            "id": _call_id(job_id, index, call.number),
            "type": "function",
            "function": {
                "name": call.name,
                "arguments": "".join(piece.text for piece in arguments if piece.number == call.number),
            },
        }
        for call in names
    ]


def _delta(job_id: UUID, index: int, piece: Piece) -> dict[str, Any]:
    if isinstance(piece, ContentPiece):
        return {"content": piece.text}
    if isinstance(piece, ReasoningPiece):
        return {"reasoning_content": piece.text}
    if isinstance(piece, CallArguments):
        return {"tool_calls": [{"index": piece.number, "function": {"arguments": piece.text}}]}
    call = {
        "index": piece.number,
        "id": _call_id(job_id, index, piece.number),
        "type": "function",
        "function": {"name": piece.name, "arguments": ""},
    }
    return {"tool_calls": [call]}


def _call_id(job_id: UUID, index: int, number: int) -> str:
    """The same whenever this output is read."""
    return "call_" + hashlib.sha256(f"{job_id}/{index}/{number}".encode()).hexdigest()[:24]


def _finish_reason(reason: FinishReason, parser: OutputParser) -> str:
    """A call that was cut off is no reason to go on: `length` stays `length`."""
    return "tool_calls" if reason is FinishReason.STOP and parser.num_calls else FINISH_REASONS[reason]


def _head(job_id: UUID, job: Job | Run, object_: str, service_tier: str | None) -> dict[str, object]:
    return {
        "id": external_id(job_id, "chatcmpl"),
        "object": object_,
        "created": int(job.created_at.timestamp()),
        "model": job.model,
        "service_tier": tier_of(service_tier, job.priority),
        "system_fingerprint": f"fp_{job.model_revision[:16]}",
    }


def _logprobs(logprobs: Sequence[TokenLogprob] | None) -> dict[str, object] | None:
    if logprobs is None:
        return None
    return {"content": content_logprobs(logprobs), "refusal": None}
