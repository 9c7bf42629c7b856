"""Anthropic's Messages: the request body, and its translation into a generation request.

The references are https://platform.claude.com/docs/en/api/messages and the types of the `anthropic` SDK, 2.14.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Final, Literal, NamedTuple

from pydantic import AfterValidator, ConfigDict, Discriminator, Field, StringConstraints, Tag

from dialects.anthropic_fields import FOREIGN_ANTHROPIC_TOOLS, is_foreign_anthropic_tool
from dialects.bodies import with_body_names
from dialects.fields import note_ignored
from dialects.native import MetadataValue
from dialects.openai import (
    MAX_PARTS,
    OpenAIModel,
    TimeoutFields,
    Unsupported,
    build,
    only,
    refuse,
    spelling_of_params,
)
from dialects.tools import (
    AskedTools,
    answer_of,
    output_of,
    spelling_of_output,
    tools_of,
)
from domain.errors import CeleriacError, InvalidRequest, UnsupportedParameter
from domain.requests import (
    MAX_MESSAGES,
    MAX_STOP_STRINGS,
    ChatMessage,
    Effort,
    Finite,
    GenerationRequest,
    SamplingParams,
    StopString,
)
from domain.structured_output import MAX_TOOLS, StructuredOutput
from text.models import ModelView

SCHEMA_PLACE = "output_config.format.schema"


class TextBlock(OpenAIModel):
    type: Literal["text"]
    text: str


class ThinkingBlock(OpenAIModel):
    type: Literal["thinking"]
    thinking: str
    signature: str | None = None  # not checked: a client may write the model's thoughts


class RedactedThinkingBlock(OpenAIModel):
    """Only its position is kept, since nobody but Anthropic can read it."""

    type: Literal["redacted_thinking"]
    data: str


class ToolUseBlock(OpenAIModel):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


def _text_only(kind: str) -> str:
    raise refuse(f"is {kind[:40]!r}; only text, thoughts, tool calls and their results can be read here")


class UnreadableBlock(OpenAIModel):
    """An image, a document, or the output of one of Anthropic's tools."""

    model_config = ConfigDict(extra="ignore")

    type: Annotated[str, AfterValidator(_text_only)]


def _tagged_by_type(*known: str) -> Discriminator:
    def tag_of(block: object) -> str:
        kind = block.get("type") if isinstance(block, dict) else getattr(block, "type", None)
        return f"<{kind}>" if kind in known else "<other>"

    return Discriminator(tag_of)


_Unreadable = Annotated[UnreadableBlock, Tag("<other>")]

_Text = Annotated[TextBlock, Tag("<text>")]

TextOnlyBlock = Annotated[_Text | _Unreadable, _tagged_by_type("text")]


TextContent = Annotated[
    Annotated[str, Tag("<string>")] | Annotated[list[TextOnlyBlock], Field(max_length=MAX_PARTS), Tag("<blocks>")],
    Discriminator(lambda value: "<string>" if isinstance(value, str) else "<blocks>"),
]


class ToolResultBlock(OpenAIModel):
    type: Literal["tool_result"]
    tool_use_id: str
    content: TextContent | None = None
    is_error: bool | None = None


ContentBlock = Annotated[
    _Text
    | Annotated[ThinkingBlock, Tag("<thinking>")]
    | Annotated[RedactedThinkingBlock, Tag("<redacted_thinking>")]
    | Annotated[ToolUseBlock, Tag("<tool_use>")]
    | Annotated[ToolResultBlock, Tag("<tool_result>")]
    | _Unreadable,
    _tagged_by_type("text", "thinking", "redacted_thinking", "tool_use", "tool_result"),
]

MessageContent = Annotated[
    Annotated[str, Tag("<string>")] | Annotated[list[ContentBlock], Field(max_length=MAX_PARTS), Tag("<blocks>")],
    Discriminator(lambda value: "<string>" if isinstance(value, str) else "<blocks>"),
]


class InputMessage(OpenAIModel):
    role: Literal["user", "assistant", "system"]
    content: MessageContent


class CustomTool(OpenAIModel):
    type: Annotated[str, only("custom")] | None = None
    name: str
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None


class ForeignAnthropicTool(OpenAIModel):
    """Only its position among the tools is kept."""

    model_config = ConfigDict(extra="ignore")

    type: Annotated[str, Field(json_schema_extra={"enum": sorted(FOREIGN_ANTHROPIC_TOOLS)})]


AnthropicTool = Annotated[
    Annotated[CustomTool, Tag("<custom>")] | Annotated[ForeignAnthropicTool, Tag("<foreign>")],
    Discriminator(lambda tool: "<foreign>" if is_foreign_anthropic_tool(tool) else "<custom>"),
]


class AnthropicToolChoice(OpenAIModel):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None  # of the tool that must be called
    disable_parallel_tool_use: bool | None = None


class ThinkingConfig(OpenAIModel):
    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: int | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputFormatConfig(OpenAIModel):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(OpenAIModel):
    format: OutputFormatConfig | None = None
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None


class RequestMetadata(OpenAIModel):
    user_id: MetadataValue | None = None


class PromptBody(OpenAIModel):
    """The fields that determine the prompt."""

    model: Annotated[str, StringConstraints(min_length=1, max_length=256)]
    messages: Annotated[list[InputMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    system: TextContent | None = None
    tools: Annotated[list[AnthropicTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: AnthropicToolChoice | None = None
    thinking: ThinkingConfig | None = None
    output_config: OutputConfig | None = None

    @property
    def shows_thinking(self) -> bool:
        """Whether the answer includes thoughts: as with Anthropic, only if the request asks for them."""
        return self.thinking is not None and self.thinking.type != "disabled"

    @property
    def is_parallel(self) -> bool:
        return self.tool_choice is None or self.tool_choice.disable_parallel_tool_use is not True


class MessagesBody(PromptBody, TimeoutFields):
    max_tokens: Annotated[int, Field(ge=1, le=1_000_000)]
    stop_sequences: Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)] | None = None
    temperature: Annotated[Finite, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Finite, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=1_000_000)] | None = None
    stream: bool | None = None
    metadata: RequestMetadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    use_cache: bool | None = None  # an extension

    container: Unsupported = None
    thread: Unsupported = None

    @property
    def job_metadata(self) -> dict[str, str]:
        user_id = self.metadata.user_id if self.metadata is not None else None
        return {} if user_id is None else {"user_id": user_id}


MODE_BY_CHOICE: Final = {"auto": "auto", "any": "required", "tool": "named", "none": "none"}


def to_generation_request(body: MessagesBody, view: ModelView) -> GenerationRequest:
    """`view` is the view of the body's model. Raises InvalidRequest, also for tools that the model does not support."""
    _note_idle_fields(body, view)
    try:
        asked = _asked_tools(body)
        tools = tools_of(asked, view)
        params = SamplingParams(
            max_tokens=body.max_tokens,
            stop=tuple(body.stop_sequences or ()),
            temperature=body.temperature,
            top_p=body.top_p,
            top_k=body.top_k,
            structured_output=output_of(asked, view, tools, _answer(body)),
        )
        return _request(body, view, tools=tools, params=params)
    except CeleriacError as exc:
        raise with_body_names(exc, spelling_of(body)) from None


def to_prompt(body: PromptBody, view: ModelView) -> GenerationRequest:
    """The request whose prompt is to be counted. Raises InvalidRequest."""
    try:
        return _request(body, view, tools=tools_of(_asked_tools(body), view))
    except CeleriacError as exc:
        raise with_body_names(exc, spelling_of(body)) from None


def _request(body: PromptBody, view: ModelView, **fields: Any) -> GenerationRequest:
    messages = to_messages(body)
    is_begun = messages[-1].role == "assistant"
    if is_begun and not messages[-1].begins_an_answer:
        place = f"messages.{len(body.messages) - 1}"
        raise InvalidRequest(
            f"{place} is the assistant's and ends the conversation, but is not text that can be continued; send a "
            "user message after it",
            param=place,
        )
    given = {"model": body.model, "messages": messages, "continue_final_message": is_begun}
    given |= {"parallel_tool_calls": body.is_parallel, "reasoning_effort": _effort(body, view)}
    return build(GenerationRequest, given | fields)


def spelling_of(body: PromptBody) -> dict[str, str]:
    """The body's names for the fields of our requests."""
    places = {"structured_output.json_schema": SCHEMA_PLACE}
    spelling = spelling_of_params(stop="stop_sequences", **spelling_of_output(_asked_tools(body), places))
    parameters = {
        f"tools.{number}.parameters": f"tools.{number}.input_schema" for number in range(len(body.tools or ()))
    }
    return {ours: parameters.get(theirs, theirs) for ours, theirs in spelling.items()} | parameters


def _effort(body: PromptBody, view: ModelView) -> Effort | None:
    """The effort that the chat template is given; None leaves it to the template."""
    if body.thinking is not None and body.thinking.type == "disabled":
        return "none" if view.thinking.can_switch_off else None
    effort = body.output_config.effort if body.output_config is not None else None
    if effort is not None:
        return effort if view.thinking.takes(effort) else None
    # Some templates think only if they are told to.
    return "medium" if body.shows_thinking and view.thinking.switches else None


def _note_idle_fields(body: MessagesBody, view: ModelView) -> None:
    """Name the accepted fields that have no effect on this model: its chat template decides how long it thinks."""
    is_disabled = body.thinking is not None and body.thinking.type == "disabled"
    if body.thinking is not None:
        if view.output_format.reasoning is None and not view.thinking.takes("low"):
            note_ignored(["thinking"])
        elif is_disabled and not view.thinking.can_switch_off:
            note_ignored(["thinking.type"])
        elif not is_disabled and body.thinking.budget_tokens is not None:
            note_ignored(["thinking.budget_tokens"])
    effort = body.output_config.effort if body.output_config is not None else None
    if effort is not None and (is_disabled or not view.thinking.takes(effort)):
        note_ignored(["output_config.effort"])


def _asked_tools(body: PromptBody) -> AskedTools:
    choice = body.tool_choice
    if choice is not None and (choice.type == "tool") != (choice.name is not None):
        raise InvalidRequest(
            f"tool_choice.type is {choice.type!r}; 'tool' needs a name, and no other type has one; correct one of them",
            param="tool_choice.name",
        )
    tools = {number: tool for number, tool in enumerate(body.tools or ()) if isinstance(tool, CustomTool)}
    return AskedTools(
        definitions={
            number: {
                "name": tool.name,
                "description": tool.description,
                "parameters": tool.input_schema,
                "strict": tool.strict,
            }
            for number, tool in tools.items()
        },
        place="tools.{}",
        mode="auto" if choice is None else MODE_BY_CHOICE[choice.type],
        name=None if choice is None else choice.name,
        is_parallel=body.is_parallel,
    )


def _answer(body: MessagesBody) -> StructuredOutput | None:
    """The format that output without tool calls must have."""
    if body.output_config is None or body.output_config.format is None:
        return None
    if body.messages[-1].role == "assistant":
        raise UnsupportedParameter(
            "output_config.format is given, but the last message begins the answer; leave out one of the two",
            param="output_config.format",
        )
    return answer_of(body.output_config.format.schema_, is_strict=True, place=SCHEMA_PLACE)


class _Piece(NamedTuple):
    """Part of one of our messages, and its place in the body."""

    place: str
    role: str
    text: str = ""
    thought: str = ""
    call: dict[str, str] | None = None
    tool_call_id: str | None = None


def to_messages(body: PromptBody) -> list[ChatMessage]:
    """Consecutive messages of one role become one, as with Anthropic; each tool result becomes one. Raises
    InvalidRequest."""
    pieces = [_Piece("system", "system", _text_of(body.system))] if body.system else []
    for number, message in enumerate(body.messages):
        pieces += _pieces_of(message, f"messages.{number}")
    groups: list[list[_Piece]] = []
    for piece in pieces:
        if groups and groups[-1][0].role == piece.role != "tool":
            groups[-1].append(piece)
        else:
            groups.append([piece])
    return [_message_of(group) for group in groups]


def _message_of(group: Sequence[_Piece]) -> ChatMessage:
    try:
        return build(ChatMessage, _joined(group))
    except InvalidRequest as exc:
        raise with_body_names(exc, _places_of(group)) from None


def _places_of(group: Sequence[_Piece]) -> dict[str, str]:
    """Where the body has the fields of the message that these pieces make."""
    message = ".".join(group[0].place.split(".")[:2])
    content = message if message == "system" else f"{message}.content"
    places = {"content": content, "reasoning_content": content, "tool_calls": content}
    places["tool_call_id"] = f"{group[0].place}.tool_use_id"
    calls = [piece.place for piece in group if piece.call is not None]
    for number, place in enumerate(calls):
        places |= {f"tool_calls.{number}": place, f"tool_calls.{number}.arguments": f"{place}.input"}
    return places


def _pieces_of(message: InputMessage, place: str) -> Iterable[_Piece]:
    if isinstance(message.content, str):
        yield _Piece(place, message.role, message.content)
        return
    if not message.content:
        if message.role != "assistant":
            raise InvalidRequest(f"{place}.content is empty; send a text", param=f"{place}.content")
        yield _Piece(place, message.role)
    for number, block in enumerate(message.content):
        yield _piece_of(block, message, f"{place}.content.{number}")


def _piece_of(block: OpenAIModel, message: InputMessage, place: str) -> _Piece:
    match block:
        case ToolResultBlock():
            _refuse_other_role(message, "user", block.type, place)
            text = _text_of(block.content or "")
            # Chat templates have no other way to express a failure.
            return _Piece(place, "tool", f"Error: {text}" if block.is_error else text, tool_call_id=block.tool_use_id)
        case ToolUseBlock():
            _refuse_other_role(message, "assistant", block.type, place)
            arguments = json.dumps(block.input, ensure_ascii=False)
            return _Piece(place, message.role, call={"id": block.id, "name": block.name, "arguments": arguments})
        case ThinkingBlock():
            _refuse_other_role(message, "assistant", block.type, place)
            return _Piece(place, message.role, thought=block.thinking)
        case RedactedThinkingBlock():
            _refuse_other_role(message, "assistant", block.type, place)
            note_ignored([place])
            return _Piece(place, message.role)
    assert isinstance(block, TextBlock)
    return _Piece(place, message.role, block.text)


def _refuse_other_role(message: InputMessage, role: str, kind: str, place: str) -> None:
    if message.role != role:
        raise InvalidRequest(
            f"{place} is a {kind} block in a message of role {message.role}; only messages of role {role} may have one",
            param=place,
        )


def _joined(pieces: Sequence[_Piece]) -> dict[str, Any]:
    """One message. Texts are joined by line breaks, as templates for plain text expect."""
    return {
        "role": pieces[0].role,
        "content": "\n".join(piece.text for piece in pieces if piece.text),
        "reasoning_content": "\n".join(piece.thought for piece in pieces if piece.thought) or None,
        "tool_calls": [piece.call for piece in pieces if piece.call is not None] or None,
        "tool_call_id": pieces[0].tool_call_id,
    }


def _text_of(content: str | list[Any]) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(block.text for block in content if isinstance(block, TextBlock))
