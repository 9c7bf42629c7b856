"""The body of a chat completion."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag

from api.openai.schemas import GenerationBody, OpenAIModel, StreamOptions, Strings, Unsupported, only, refuse


def _text_only(kind: str) -> str:
    if kind not in ("text", "refusal"):
        raise refuse(f"is {kind[:40]!r}; only text can be read here")
    return kind


class ContentPart(OpenAIModel):
    type: Annotated[str, AfterValidator(_text_only)]
    text: str | None = None
    refusal: str | None = None


Content = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[ContentPart], Tag("<parts>")],
    Discriminator(lambda value: "<text>" if isinstance(value, str) else "<parts>"),
]


def _known_role(role: str) -> str:
    if role == "function":
        raise refuse("is 'function', which is deprecated; send a message of role 'tool'")
    return role


class Message(OpenAIModel):
    """A message as clients send it, also one that came out of an answer and is sent back."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: Annotated[str, Field(max_length=64)] | None = None
    refusal: Annotated[Any, only("")] = None
    annotations: Annotated[Any, only([])] = None
    audio: Unsupported = None
    function_call: Unsupported = None


class ResponseFormat(OpenAIModel):
    type: Annotated[str, only("text")]


class ChatCompletionBody(GenerationBody):
    messages: Annotated[list[Message], Field(min_length=1)]
    stop: Strings | None = None
    n: int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    max_completion_tokens: int | None = None
    max_tokens: int | None = None  # the old name
    response_format: ResponseFormat | None = None
    stream_options: StreamOptions | None = None
    store: bool | None = None

    tools: Annotated[Any, only([])] = None
    tool_choice: Annotated[Any, only("none", "auto")] = None
    parallel_tool_calls: bool | None = None
    modalities: Annotated[Any, only(["text"])] = None
    audio: Unsupported = None
    functions: Unsupported = None
    function_call: Unsupported = None
    moderation: Unsupported = None
    prediction: Unsupported = None
    prompt_cache_options: Unsupported = None
    prompt_cache_retention: Unsupported = None
    reasoning_effort: Unsupported = None
    verbosity: Unsupported = None
    web_search_options: Unsupported = None
