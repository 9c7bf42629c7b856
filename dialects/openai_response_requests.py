"""The bodies of /v1/responses, and how they become requests together with the conversation so far."""

from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal, Self

from pydantic import AfterValidator, ConfigDict, Discriminator, Field, StringConstraints, Tag, model_validator

from dialects.aliases import MAX_OUTPUT_TOKENS
from dialects.bodies import with_body_names
from dialects.fields import NOT_INCLUDED
from dialects.openai import (
    GenerationBody,
    OpenAIModel,
    Strings,
    Unsupported,
    build,
    note_unread,
    only,
    publish_default_model,
    refuse_unused_stream_options,
    spelling_of_params,
    strings,
    take_effort,
)
from dialects.openai_response_items import CompactionItem, ItemId, ItemReference, ResponseInput, Text, messages_of
from dialects.openai_response_tools import (
    ResponseAllowedTools,
    ResponseFunctionTool,
    ResponseNamedTool,
    ResponseTool,
    ResponseToolChoice,
    mode_of,
)
from dialects.tools import (
    AskedTools,
    answer_of,
    output_of,
    spelling_of_output,
    tools_of,
)
from domain.errors import InvalidRequest
from domain.requests import NO_BOUND, Effort, GenerationRequest
from domain.structured_output import MAX_TOOLS, StructuredOutput
from domain.template_kwargs import TemplateKwargs
from text.models import ModelView


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
            raise ValueError(f"{name} is set but type is {self.type!r}; set type to json_schema, or leave out {name}")
        return self


class TextConfig(OpenAIModel):
    format: TextFormat | None = None


class ResponseStreamOptions(OpenAIModel):
    """All its fields are hints, which are removed before validation."""


class ReasoningConfig(OpenAIModel):
    effort: Effort | None = None


LOGPROBS: Final = "message.output_text.logprobs"  # the only value that has an effect

Includable = Annotated[str, only(LOGPROBS, *NOT_INCLUDED)]


def _refuse_no_output(max_output_tokens: int) -> int:
    if max_output_tokens == 0:
        raise ValueError("it is 0, so there would be nothing to return; raise it or leave it out")
    return max_output_tokens


class ConversationById(OpenAIModel):
    id: ItemId


#: A conversation's id, or an object that has it.
ConversationName = Annotated[
    Annotated[ItemId, Tag("<id>")] | Annotated[ConversationById, Tag("<object>")],
    Discriminator(lambda value: "<id>" if isinstance(value, str) else "<object>"),
]


class ContextBody(OpenAIModel):
    """What of a body says where the conversation so far is."""

    previous_response_id: ItemId | None = None
    conversation: ConversationName | None = None

    @property
    def conversation_id(self) -> str | None:
        """As the client names it."""
        return self.conversation.id if isinstance(self.conversation, ConversationById) else self.conversation


class ResponseBody(ContextBody, GenerationBody):
    ALIASES = GenerationBody.ALIASES | MAX_OUTPUT_TOKENS

    input: ResponseInput
    instructions: Text | None = None
    background: bool | None = None
    store: bool | None = None
    max_output_tokens: Annotated[int, Field(ge=NO_BOUND), AfterValidator(_refuse_no_output)] | None = None
    text: TextConfig | None = None
    tools: Annotated[list[ResponseTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ResponseToolChoice | None = None
    parallel_tool_calls: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    include: Annotated[list[Includable], Field(max_length=16)] | None = None
    max_tool_calls: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = (
        None  # about built-in tools, of which there are none here
    )
    stream_options: ResponseStreamOptions | None = None
    stop: Strings | None = None  # an extension here

    access_programs: Unsupported = None
    image: Unsupported = None
    moderation: Unsupported = None
    prompt: Unsupported = None
    reasoning: ReasoningConfig | None = None
    chat_template_kwargs: TemplateKwargs | None = None

    @property
    def is_stored(self) -> bool:
        return self.store is not False

    @property
    def has_logprobs(self) -> bool:
        return LOGPROBS in (self.include or ()) or self.top_logprobs is not None

    @property
    def is_self_contained(self) -> bool:
        """Whether it means the same whatever is stored."""
        if self.previous_response_id is not None or self.conversation is not None:
            return False
        items = () if isinstance(self.input, str) else self.input
        return not any(isinstance(item, ItemReference | CompactionItem) for item in items)


class InputTokensBody(ContextBody):
    """The fields of a response's body that determine its prompt, for counting its tokens."""

    model_config = ConfigDict(json_schema_extra=publish_default_model)

    model: Annotated[str, StringConstraints(min_length=1, max_length=256)]
    input: ResponseInput
    instructions: Text | None = None
    tools: Annotated[list[ResponseTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ResponseToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    chat_template_kwargs: TemplateKwargs | None = None


SCHEMA_PLACE = "text.format.schema"


def to_generation_request(
    body: ResponseBody, view: ModelView, context: Sequence[dict[str, Any]] = ()
) -> GenerationRequest:
    """`view` is that of the body's model, `context` the messages of the conversation so far. Raises InvalidRequest."""
    try:
        return _generation_request(body, view, context)
    except InvalidRequest as exc:
        raise with_body_names(with_input_for_messages(exc), spelling_of(body)) from None


def with_input_for_messages(exc: InvalidRequest) -> InvalidRequest:
    """The same error, which names the input as a whole: items do not correspond to messages one to one, so an index of
    a message would be misleading."""
    if (exc.param or "").startswith("messages"):
        exc.message, exc.param = exc.message.replace(str(exc.param), "input", 1), "input"
    return exc


def _generation_request(body: ResponseBody, view: ModelView, context: Sequence[dict[str, Any]]) -> GenerationRequest:
    refuse_unused_stream_options(body)
    note_unread(body.chat_template_kwargs, view)
    effort = body.reasoning.effort if body.reasoning else None
    asked = _asked_tools(body)
    tools = tools_of(asked, view)
    params = body.sampling(
        max_tokens=body.max_output_tokens,
        stop=strings(body.stop),
        logprobs=(body.top_logprobs or 0) if body.has_logprobs else None,
        structured_output=output_of(asked, view, tools, _answer(body)),
    )
    messages = messages_of(body.input, instructions=body.instructions, context=context)
    request: dict[str, Any] = {"model": body.model, "messages": messages, "tools": tools, "params": params}
    request |= {
        "parallel_tool_calls": body.parallel_tool_calls,
        "reasoning_effort": take_effort(effort, view, place="reasoning.effort"),
        "chat_template_kwargs": body.chat_template_kwargs,
    }
    return build(GenerationRequest, request)


def spelling_of(body: ResponseBody) -> dict[str, str]:
    output = spelling_of_output(_asked_tools(body), _places_of_answer(body))
    return spelling_of_params(
        **output, max_tokens="max_output_tokens", messages="input", reasoning_effort="reasoning.effort"
    )


def _places_of_answer(body: ResponseBody) -> dict[str, str]:
    if _format_of(body) is None or body.structured_output is not None:
        return {}
    return {"structured_output.json_schema": SCHEMA_PLACE, "structured_output.json_object": "text.format"}


def _asked_tools(body: ResponseBody) -> AskedTools:
    choice = body.tool_choice
    return AskedTools(
        definitions={
            number: tool.model_dump(exclude={"type"})
            for number, tool in enumerate(body.tools or ())
            if isinstance(tool, ResponseFunctionTool)
        },
        place="tools.{}",
        mode=mode_of(choice),
        name=choice.name if isinstance(choice, ResponseNamedTool) else None,
        is_parallel=body.parallel_tool_calls is not False,
        allowed=frozenset(tool.name for tool in choice.tools) if isinstance(choice, ResponseAllowedTools) else None,
    )


def _answer(body: ResponseBody) -> StructuredOutput | None:
    """The required form of an output without calls; None if any text is allowed."""
    format = _format_of(body)
    if format is None:
        return body.structured_output
    if body.structured_output is not None:
        raise InvalidRequest("structured_output and text.format are both set; send only one", param="text.format")
    return _formatted(format)


def _format_of(body: ResponseBody) -> TextFormat | None:
    """The format that the body requires; None if any text is allowed."""
    format = body.text.format if body.text else None
    return None if format is None or format.type == "text" else format


def _formatted(format: TextFormat) -> StructuredOutput:
    if format.type == "json_object":
        return StructuredOutput(json_object=True)
    if format.schema_ is None:
        raise InvalidRequest("text.format.schema is missing; add it", param="text.format.schema")
    if format.name is None:
        raise InvalidRequest("text.format.name is missing; add it", param="text.format.name")
    return answer_of(format.schema_, is_strict=format.strict is True, place=SCHEMA_PLACE)
