"""The body of a chat completion."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag

from api.openai.schemas import (
    MAX_PARTS,
    Effort,
    ForeignTool,
    GenerationBody,
    OpenAIModel,
    StreamOptions,
    Strings,
    Unsupported,
    only,
    refuse,
    tag_of_tool,
)
from domain.requests import MAX_MESSAGES
from domain.tools import MAX_TOOLS


def _text_only(kind: str) -> str:
    if kind not in ("text", "refusal"):
        raise refuse(f"is {kind[:40]!r}; only text can be read here")
    return kind


class ContentPart(OpenAIModel):
    type: Annotated[str, AfterValidator(_text_only)]
    text: str | None = None
    refusal: str | None = None


ChatContent = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[ContentPart], Field(max_length=MAX_PARTS), Tag("<parts>")],
    Discriminator(lambda value: "<text>" if isinstance(value, str) else "<parts>"),
]


class CalledFunction(OpenAIModel):
    name: str
    arguments: str


class MessageToolCall(OpenAIModel):
    id: str
    type: Annotated[str, only("function")] = "function"
    function: CalledFunction
    index: int | None = None  # in calls that were put together from a stream


class Message(OpenAIModel):
    """A message as clients send it, also one that came out of an answer and is sent back. What else it has then is
    among the hints."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: ChatContent | None = None
    name: Annotated[str, Field(max_length=64)] | None = None
    tool_calls: Annotated[list[MessageToolCall], Field(max_length=MAX_TOOLS)] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None  # said in place of the content
    audio: Unsupported = None
    function_call: Unsupported = None


class Function(OpenAIModel):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionTool(OpenAIModel):
    type: Annotated[str, only("function")]
    function: Function


Tool = Annotated[
    Annotated[FunctionTool, Tag("<function>")] | Annotated[ForeignTool, Tag("<foreign>")], Discriminator(tag_of_tool)
]


class NamedFunction(OpenAIModel):
    name: str


class NamedTool(OpenAIModel):
    type: Annotated[str, only("function")]
    function: NamedFunction


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<mode>")] | Annotated[NamedTool, Tag("<named>")],
    Discriminator(lambda value: "<mode>" if isinstance(value, str) else "<named>"),
]


class JsonSchemaFormat(OpenAIModel):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(OpenAIModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class ChatCompletionBody(GenerationBody):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    stop: Strings | None = None
    n: int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    max_completion_tokens: int | None = None
    max_tokens: int | None = None  # the old name
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    stream_options: StreamOptions | None = None
    store: bool | None = None
    reasoning_effort: Effort | None = None

    modalities: Annotated[Any, only(["text"])] = None
    audio: Unsupported = None
    functions: Unsupported = None
    function_call: Unsupported = None
    moderation: Unsupported = None
    web_search_options: Unsupported = None
