"""A token costs a stream as much at its end as at its beginning: nothing that a writer holds is copied with it."""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest

from api.durable_streams import JsonMessages, PlainText
from api.events import (
    event_of,
)
from api.simple import GeneratedStream
from api.sse import (
    frame,
)
from dialects.anthropic_answers import MessageStream
from dialects.anthropic_requests import MessagesBody
from dialects.openai_chat import ChatStream
from dialects.openai_completions import CompletionStream, Prompt
from dialects.openai_response_output import ResponseOutput
from domain.requests import ChatMessage, GenerationRequest, SamplingParams, TokenChunk, TokenLogprob
from domain.structured_output import ToolDefinition
from text.outputs import OutputFormat, ReasoningFormat
from text.parsers import parser_of

NUM_TOKENS = 4_000
JOB_ID = UUID(int=1)
REQUEST = GenerationRequest(
    model="m",
    messages=(ChatMessage(role="user", content="x"),),
    tools=(ToolDefinition(name="f"),),
    params=SamplingParams(logprobs=1),
)
FORMAT = OutputFormat("hermes", ReasoningFormat.TAGGED)
JOB: Any = SimpleNamespace(
    job_id=JOB_ID,
    model_name="m",
    model_revision="r",
    created_at=datetime.now(UTC),
    num_prompt_tokens=1,
    priority=0,
    service_tier=None,
)

Write = Callable[[TokenChunk], object]


def chat() -> tuple[object, Write]:
    stream = ChatStream(JOB, REQUEST, FORMAT, has_usage=True, service_tier=None)
    return stream, stream.from_chunk


def completion() -> tuple[object, Write]:
    stream = CompletionStream(JOB, Prompt(0, 1, logprobs=1), has_usage=True, service_tier=None)
    return stream, stream.from_chunk


def message() -> tuple[object, Write]:
    given = {"messages": [{"role": "user", "content": "x"}], "thinking": {"type": "adaptive"}}
    body = MessagesBody.model_validate({"model": "m", "max_tokens": 1} | given)
    stream = MessageStream(JOB, REQUEST, body, FORMAT)
    return stream, stream.from_chunk


def response() -> tuple[object, Write]:
    """Also on a WebSocket."""
    output = ResponseOutput(JOB_ID, parser_of(REQUEST, FORMAT))
    return output, lambda chunk: output.push(chunk.text, chunk.logprobs)


def generated() -> tuple[object, Write]:
    stream = GeneratedStream()
    return stream, stream.from_chunk


def native() -> tuple[object, Write]:
    return None, lambda chunk: [frame(*event_of(chunk, "job"), id=chunk.sequence_number)]


def durable(content: Any) -> tuple[object, Write]:
    return content, lambda chunk: [content.of(chunk, is_first=False)]


WRITERS: dict[str, Callable[[], tuple[object, Write]]] = {
    "chat": chat,
    "completion": completion,
    "message": message,
    "response": response,
    "generated": generated,
    "native": native,
    "durable json": partial(durable, JsonMessages("job")),
    "durable text": partial(durable, PlainText(0)),
}


@pytest.mark.parametrize("beginning", ["", "<think>", '<tool_call>{"name": "f", "arguments": {"a": "'])
@pytest.mark.parametrize("writer", WRITERS)
def test_what_a_writer_holds_is_not_copied_with_every_token(writer: str, beginning: str) -> None:
    owner, write = WRITERS[writer]()
    write_all(write, [beginning])
    write_all(write, ["word "] * NUM_TOKENS)
    before = {id(one): one for one in large_parts(owner)}
    assert max(len(repr(events)) for events in write_all(write, ["word "] * 3)) < 2_000, "it has only its own token"
    assert {id(one) for one in large_parts(owner)} <= before.keys()


def write_all(write: Write, texts: list[str]) -> list[list[object]]:
    return [list(write(chunk_of(text))) for text in texts]  # type: ignore[call-overload]


def chunk_of(text: str) -> TokenChunk:
    logprob = TokenLogprob(token=text, token_id=1, logprob=-1.0, bytes=tuple(text.encode()), top=(), top_bytes=())
    return TokenChunk(sequence_number=5, index=0, text=text, token_ids=(1,), logprobs=(logprob,))


def large_parts(owner: object, seen: set[int] | None = None) -> Iterator[object]:
    """The long texts and containers that belong to an object."""
    seen = set() if seen is None else seen
    if id(owner) in seen:
        return
    seen.add(id(owner))
    if isinstance(owner, str | bytes | list | tuple | dict | set) and len(owner) > NUM_TOKENS // 4:
        yield owner
    if isinstance(owner, list | tuple | set):
        parts = list(owner)
    elif isinstance(owner, dict):
        parts = list(owner.values())
    else:
        parts = list(vars(owner).values()) if hasattr(owner, "__dict__") else []
    for part in parts:
        yield from large_parts(part, seen)
