"""The messages of a chat completion's body, and their translation to the messages of a request."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag

from dialects.bodies import with_body_names
from dialects.openai import MAX_PARTS, OpenAIModel, Unsupported, build_at, only, refuse
from domain.errors import InvalidRequest
from domain.requests import ChatMessage
from domain.structured_output import MAX_TOOLS

#: The last two are those of the Responses API, which other servers read here, too.
PART_TYPES = ("text", "refusal", "input_text", "output_text")


def _text_only(kind: str) -> str:
    if kind not in PART_TYPES:
        raise refuse(f"is {kind[:40]!r}; only text is supported")
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
    index: int | None = None  # present in calls that clients assembled from a stream


class Message(OpenAIModel):
    """A message as clients send it. It may come from an earlier answer, whose extra fields are ignored as hints."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: ChatContent | None = None
    name: Annotated[str, Field(max_length=64)] | None = None
    tool_calls: Annotated[list[MessageToolCall], Field(max_length=MAX_TOOLS)] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None  # instead of content
    audio: Unsupported = None
    function_call: Unsupported = None


def to_message(message: Message, number: int) -> ChatMessage:
    """`number` is its index in the body. Raises InvalidRequest."""
    place = f"messages.{number}"
    says_nothing = not (message.tool_calls or message.refusal or message.reasoning_content)
    if message.content is None and (message.role != "assistant" or says_nothing):
        raise InvalidRequest(f"{place}.content is missing; add it", param=f"{place}.content")
    if message.tool_calls and message.role != "assistant":
        raise InvalidRequest(
            f"{place} has the role {message.role}; only assistant messages may have tool_calls",
            param=f"{place}.tool_calls",
        )
    if (message.role == "tool") != (message.tool_call_id is not None):
        raise InvalidRequest(
            f"{place} has the role {message.role}; tool messages must have a tool_call_id, and no others may",
            param=f"{place}.tool_call_id",
        )
    calls = [{"id": call.id} | call.function.model_dump() for call in message.tool_calls or ()]
    fields: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": content_text(message),
        "name": message.name,
        "reasoning_content": message.reasoning_content,
        "tool_calls": calls or None,
        "tool_call_id": message.tool_call_id,
    }
    try:
        return build_at(place, ChatMessage, fields)
    except InvalidRequest as exc:
        raise with_body_names(exc, _places_of_calls(place, len(calls))) from None


def _places_of_calls(place: str, num_calls: int) -> dict[str, str]:
    ours = [f"tool_calls.{number}" for number in range(num_calls)]
    names = [(f"{call}.{name}", f"{call}.function.{name}") for call in ours for name in ("name", "arguments")]
    return dict(names) | {f"{place}.{name}": f"{place}.{body_name}" for name, body_name in names}


def content_text(message: Message) -> str:
    """The text of the content; parts are joined with line breaks, as chat templates expect. A refusal counts as
    content."""
    if message.content is None:
        return message.refusal or ""
    if isinstance(message.content, str):
        return message.content
    return "\n".join(part.text or part.refusal or "" for part in message.content)
