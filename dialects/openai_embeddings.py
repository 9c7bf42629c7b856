"""Embeddings, whose inputs are texts or token ids: body, request and answer."""

import base64
import struct
from collections.abc import Sequence
from typing import Annotated, Literal, cast

import orjson
from pydantic import ConfigDict, Discriminator, Field, StringConstraints, Tag

from dialects.bodies import with_body_names
from dialects.openai import CallerId, TimeoutFields, build, publish_default_model
from dialects.openai_messages import Message, to_message
from dialects.openai_views import (
    View,
)
from domain.errors import InvalidRequest
from domain.requests import (
    MAX_INPUT_TOKENS,
    MAX_INPUTS,
    MAX_MESSAGES,
    MAX_PROMPT_CHARS,
    EmbeddingRequest,
    EmbeddingResult,
)
from storage.job_queries import JobRecord
from text.models import ModelView


def _shape(value: object) -> str:
    if isinstance(value, str):
        return "<text>"
    first = value[0] if isinstance(value, list) and value else None
    if isinstance(first, list):
        return "<lists of token ids>"
    return "<texts>" if isinstance(first, str) else "<token ids>"


TokenIds = Annotated[list[int], Field(max_length=MAX_INPUT_TOKENS)]

#: The tags keep the names of the branches out of error messages.
EmbeddingInputs = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[list[str], Field(max_length=MAX_INPUTS), Tag("<texts>")]
    | Annotated[TokenIds, Tag("<token ids>")]
    | Annotated[list[TokenIds], Field(max_length=MAX_INPUTS), Tag("<lists of token ids>")],
    Discriminator(_shape),
]


class EmbeddingBody(TimeoutFields):
    model_config = ConfigDict(json_schema_extra=publish_default_model)

    model: Annotated[str, StringConstraints(min_length=1, max_length=256)]
    input: EmbeddingInputs | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    user: CallerId | None = None

    # vLLM's
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_generation_prompt: bool | None = None
    truncate_prompt_tokens: int | None = None


class EmbeddingView(View):
    object: Literal["embedding"]
    index: int
    embedding: Annotated[
        list[float] | str, Field(description="A list of numbers, or little-endian float32 numbers in base64.")
    ]


class EmbeddingUsageView(View):
    prompt_tokens: int
    total_tokens: int


class EmbeddingListView(View):
    object: Literal["list"]
    data: list[EmbeddingView]
    model: str
    usage: EmbeddingUsageView


def to_embedding_request(body: EmbeddingBody, view: ModelView) -> EmbeddingRequest:
    """`view` is that of the body's model. Raises InvalidRequest."""
    _refuse_other_than_one_input(body)
    inputs = _inputs(body) if body.messages is None else [_conversation(body.messages, body, view)]
    fields = {
        "model": body.model,
        "inputs": inputs,
        "dimensions": body.dimensions,
        "truncate_prompt_tokens": body.truncate_prompt_tokens,
    }
    try:
        return build(EmbeddingRequest, fields)
    except InvalidRequest as exc:
        exc.param = exc.param or "inputs"
        raise with_body_names(exc, spelling_of_embeddings(body)) from None


def spelling_of_embeddings(body: EmbeddingBody) -> dict[str, str]:
    """Our `inputs.2` is `input.2` in the body, or `input` if there is only one."""
    if body.input is None:
        return {"inputs.0": "messages", "inputs": "messages"}
    is_one = len(_inputs(body)) == 1
    return ({"inputs.0": "input"} if is_one else {}) | {"inputs": "input"}


def embeddings_from_result(record: JobRecord, body: EmbeddingBody) -> EmbeddingListView:
    """The embeddings of a completed job."""
    assert isinstance(record.result, EmbeddingResult)
    usage = record.result.usage
    is_base64 = body.encoding_format == "base64"
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": vector if is_base64 else _numbers(vector)}
            for index, vector in enumerate(record.result.embeddings)
        ],
        "model": record.job.model_name,
        "usage": {"prompt_tokens": usage.prompt_tokens, "total_tokens": usage.prompt_tokens},
    }


def _refuse_other_than_one_input(body: EmbeddingBody) -> None:
    if body.input is None and body.messages is None:
        raise InvalidRequest("input is missing; add it, or messages", param="input")
    if body.input is not None and body.messages is not None:
        raise InvalidRequest("input and messages are both set; send only one of them", param="messages")
    if body.add_generation_prompt is not None and body.messages is None:
        raise InvalidRequest(
            "add_generation_prompt is for the chat template; send messages, or leave it out",
            param="add_generation_prompt",
        )


def _conversation(messages: Sequence[Message], body: EmbeddingBody, view: ModelView) -> list[int]:
    """The tokens of all messages: one input. Raises InvalidRequest."""
    chat = [to_message(message, number) for number, message in enumerate(messages)]
    num_chars = sum(len(message.content) for message in chat)
    if num_chars > MAX_PROMPT_CHARS:
        raise InvalidRequest(
            f"messages have {num_chars} characters, more than {MAX_PROMPT_CHARS}; send fewer", param="messages"
        )
    return view.encode_conversation(chat, add_generation_prompt=bool(body.add_generation_prompt))


def _inputs(body: EmbeddingBody) -> Sequence[object]:
    assert body.input is not None
    is_one = isinstance(body.input, str) or (bool(body.input) and isinstance(body.input[0], int))
    return [body.input] if is_one else body.input


def _numbers(vector: str) -> list[float]:
    """The vector as JSON numbers, each the double equal to its float32. One vector at a time, because encoding millions
    of numbers in one call would block all other threads."""
    packed = base64.b64decode(vector)
    return cast(list[float], orjson.Fragment(orjson.dumps(struct.unpack(f"<{len(packed) // 4}f", packed))))
