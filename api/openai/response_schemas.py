"""The body of a response."""

from typing import Annotated, Any, Final, Literal, Self

from pydantic import AfterValidator, Discriminator, Field, StringConstraints, Tag, model_validator

from api.openai.hints import NOT_INCLUDED
from api.openai.schemas import (
    MAX_PARTS,
    Effort,
    ForeignTool,
    GenerationBody,
    OpenAIModel,
    Strings,
    Unsupported,
    only,
    refuse,
    tag_of_tool,
)
from domain.requests import MAX_MESSAGES, MAX_PROMPT_CHARS, NO_BOUND
from domain.tools import MAX_TOOL_CHARS, MAX_TOOLS, ToolName

PART_TYPES = ("input_text", "output_text", "text", "refusal")

Text = Annotated[str, StringConstraints(max_length=MAX_PROMPT_CHARS)]
ItemId = Annotated[str, StringConstraints(max_length=128)]
ItemStatus = Literal["in_progress", "completed", "incomplete"]
Phase = Literal["commentary", "final_answer"]


def _text_only(kind: str) -> str:
    if kind not in PART_TYPES:
        raise refuse(f"is {kind[:40]!r}; only text can be read here")
    return kind


class ResponseContentPart(OpenAIModel):
    """Also one that came out of an answer and is sent back, with what is no concern of the prompt."""

    type: Annotated[str, AfterValidator(_text_only)]
    text: Text | None = None
    refusal: Text | None = None
    annotations: list[dict[str, Any]] | None = None
    logprobs: list[Any] | None = None


ResponseContent = Annotated[
    Annotated[Text, Tag("<text>")] | Annotated[list[ResponseContentPart], Field(max_length=MAX_PARTS), Tag("<parts>")],
    Discriminator(lambda value: "<text>" if isinstance(value, str) else "<parts>"),
]


class MessageItem(OpenAIModel):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: ResponseContent
    id: ItemId | None = None
    status: ItemStatus | None = None
    phase: Phase | None = None


class FunctionCallItem(OpenAIModel):
    type: Literal["function_call"]
    call_id: ItemId
    name: ToolName
    arguments: Annotated[str, StringConstraints(max_length=MAX_TOOL_CHARS)]
    id: ItemId | None = None
    status: ItemStatus | None = None


class FunctionCallOutputItem(OpenAIModel):
    type: Literal["function_call_output"]
    call_id: ItemId
    name: str | None = None  # whose output it is, which its call says
    output: ResponseContent
    id: ItemId | None = None
    status: ItemStatus | None = None


class SummaryPart(OpenAIModel):
    type: Literal["summary_text"]
    text: Text


class ThoughtPart(OpenAIModel):
    type: Literal["reasoning_text"]
    text: Text


class ReasoningItem(OpenAIModel):
    """Of an earlier answer, sent back. No model reads its old thoughts again, so it adds nothing to the prompt."""

    type: Literal["reasoning"]
    summary: Annotated[list[SummaryPart], Field(max_length=MAX_PARTS)] | None = None
    content: Annotated[list[ThoughtPart], Field(max_length=MAX_PARTS)] | None = None
    id: ItemId | None = None
    status: ItemStatus | None = None


class UnknownItem(OpenAIModel):
    type: Annotated[Any, AfterValidator(lambda kind: _refuse_item(kind))]


def _refuse_item(kind: Any) -> None:
    raise refuse(f"is {str(kind)[:40]!r}; send items of type {', '.join(ITEM_TYPES)}")


ITEM_TYPES = ("message", "function_call", "function_call_output", "reasoning")


def _item_tag(value: Any) -> str:
    kind = (value.get("type") or "message") if isinstance(value, dict) else getattr(value, "type", "message")
    return f"<{kind}>" if kind in ITEM_TYPES else "<unknown>"


InputItem = Annotated[
    Annotated[MessageItem, Tag("<message>")]
    | Annotated[FunctionCallItem, Tag("<function_call>")]
    | Annotated[FunctionCallOutputItem, Tag("<function_call_output>")]
    | Annotated[ReasoningItem, Tag("<reasoning>")]
    | Annotated[UnknownItem, Tag("<unknown>")],
    Discriminator(_item_tag),
]
ResponseInput = Annotated[
    Annotated[Text, StringConstraints(min_length=1), Tag("<text>")]
    | Annotated[list[InputItem], Field(min_length=1, max_length=4 * MAX_MESSAGES), Tag("<items>")],
    Discriminator(lambda value: "<text>" if isinstance(value, str) else "<items>"),
]


class TextFormat(OpenAIModel):
    type: Literal["text", "json_schema", "json_object"]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")] | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _refuse_fields_of_another_type(self) -> Self:
        given = {"name", "description", "schema_", "strict"} & self.model_fields_set
        if self.type != "json_schema" and given:
            name = min(given).rstrip("_")
            raise ValueError(f"{name} is given, but type is {self.type!r}; send json_schema or leave {name} out")
        return self


class TextConfig(OpenAIModel):
    format: TextFormat | None = None


class ResponseFunctionTool(OpenAIModel):
    type: Annotated[str, only("function")]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


ResponseTool = Annotated[
    Annotated[ResponseFunctionTool, Tag("<function>")] | Annotated[ForeignTool, Tag("<foreign>")],
    Discriminator(tag_of_tool),
]


class ResponseNamedTool(OpenAIModel):
    type: Annotated[str, only("function")]
    name: str


ResponseToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<mode>")] | Annotated[ResponseNamedTool, Tag("<tool>")],
    Discriminator(lambda value: "<mode>" if isinstance(value, str) else "<tool>"),
]


class ResponseStreamOptions(OpenAIModel):
    """Empty, once the hints are taken out."""


class ReasoningConfig(OpenAIModel):
    effort: Effort | None = None


LOGPROBS: Final = "message.output_text.logprobs"  # all that there is to include
Includable = Annotated[str, only(LOGPROBS, *NOT_INCLUDED)]


def _refuse_no_output(max_output_tokens: int) -> int:
    if max_output_tokens == 0:
        raise ValueError("it is 0, which leaves nothing to answer; raise it or leave it out")
    return max_output_tokens


class ResponseBody(GenerationBody):
    input: ResponseInput
    instructions: Text | None = None
    previous_response_id: ItemId | None = None
    background: bool | None = None
    store: bool | None = None
    max_output_tokens: Annotated[int, Field(ge=NO_BOUND), AfterValidator(_refuse_no_output)] | None = None
    text: TextConfig | None = None
    tools: Annotated[list[ResponseTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ResponseToolChoice | None = None
    parallel_tool_calls: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    include: Annotated[list[Includable], Field(max_length=16)] | None = None
    max_tool_calls: int | None = None  # of tools that are run here, of which there are none
    stream_options: ResponseStreamOptions | None = None
    stop: Strings | None = None  # an extension here

    access_programs: Unsupported = None
    context_management: Unsupported = None
    conversation: Unsupported = None
    image: Unsupported = None
    moderation: Unsupported = None
    prompt: Unsupported = None
    reasoning: ReasoningConfig | None = None

    @property
    def is_stored(self) -> bool:
        return self.store is not False

    @property
    def has_logprobs(self) -> bool:
        return LOGPROBS in (self.include or ()) or self.top_logprobs is not None


class InputTokensBody(OpenAIModel):
    """What of a response makes its prompt, to be counted."""

    model: Annotated[str, StringConstraints(min_length=1, max_length=256)]
    input: ResponseInput
    instructions: Text | None = None
    previous_response_id: ItemId | None = None
    tools: Annotated[list[ResponseTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ResponseToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    conversation: Unsupported = None
    reasoning: ReasoningConfig | None = None
