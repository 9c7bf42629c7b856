"""The bodies of /v1/responses, and how they become requests together with the conversation so far."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Final, Literal, Self
from uuid import UUID

from pydantic import AfterValidator, ConfigDict, Discriminator, Field, StringConstraints, Tag, model_validator

from dialects.aliases import MAX_OUTPUT_TOKENS
from dialects.bodies import with_body_names
from dialects.fields import NOT_INCLUDED
from dialects.openai import (
    MAX_PARTS,
    AskedTools,
    GenerationBody,
    OpenAIModel,
    Strings,
    Unsupported,
    answer_of,
    build,
    note_unread,
    only,
    output_of,
    publish_default_model,
    refuse,
    refuse_unused_stream_options,
    spelling_of_output,
    spelling_of_params,
    strings,
    take_effort,
    tools_of,
)
from dialects.openai_response_tools import (
    ResponseAllowedTools,
    ResponseFunctionTool,
    ResponseNamedTool,
    ResponseTool,
    ResponseToolChoice,
    mode_of,
)
from domain.errors import InvalidRequest
from domain.jobs import external_id
from domain.requests import MAX_MESSAGES, MAX_PROMPT_CHARS, NO_BOUND, Effort, GenerationRequest
from domain.structured_output import MAX_TOOL_CHARS, MAX_TOOLS, StructuredOutput, ToolName
from domain.template_kwargs import TemplateKwargs
from text.models import ModelView

PART_TYPES = ("input_text", "output_text", "text", "refusal")

Text = Annotated[str, StringConstraints(max_length=MAX_PROMPT_CHARS)]

ItemId = Annotated[str, StringConstraints(max_length=128)]

ItemStatus = Literal["in_progress", "completed", "incomplete"]

Phase = Literal["commentary", "final_answer"]


def _text_only(kind: str) -> str:
    if kind not in PART_TYPES:
        raise refuse(f"is {kind[:40]!r}; only text is supported")
    return kind


class ResponseContentPart(OpenAIModel):
    """A part as clients send it. It may come from an earlier answer, with fields that are not part of the prompt."""

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
    name: str | None = None  # of the function, which is also in its call
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
    """An item from an earlier answer. Models do not read their earlier reasoning, so it is left out of the prompt."""

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


class ResponseBody(GenerationBody):
    ALIASES = GenerationBody.ALIASES | MAX_OUTPUT_TOKENS

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
    max_tool_calls: int | None = None  # about built-in tools, of which there are none here
    stream_options: ResponseStreamOptions | None = None
    stop: Strings | None = None  # an extension here

    access_programs: Unsupported = None
    context_management: Unsupported = None
    conversation: Unsupported = None
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


class InputTokensBody(OpenAIModel):
    """The fields of a response's body that determine its prompt, for counting its tokens."""

    model_config = ConfigDict(json_schema_extra=publish_default_model)

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
    chat_template_kwargs: TemplateKwargs | None = None


def messages_of(
    input_: ResponseInput, *, instructions: str | None, context: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Messages in the form of `domain.requests.ChatMessage`: the instructions, then `context` (the conversation so
    far), then the input."""
    messages = [dict(message) for message in context]
    if isinstance(input_, str):
        messages.append({"role": "user", "content": input_})
    else:
        for item in input_:
            _add_item(messages, item)
    return [{"role": "system", "content": instructions}, *messages] if instructions else messages


def add_output(messages: list[dict[str, Any]], items: Iterable[Mapping[str, Any]]) -> None:
    """Append the output items of an answer to the conversation that continues it."""
    for item in items:
        if item["type"] == "message":
            messages.append({"role": "assistant", "content": item["content"][0]["text"]})
        elif item["type"] == "function_call":
            _add_call(messages, item["call_id"], item["name"], item["arguments"])


def listed_items(job_id: UUID, input_: ResponseInput) -> list[dict[str, Any]]:
    """The items as they are listed, each with an id: its own or a stable one."""
    ulid = external_id(job_id, "resp").removeprefix("resp_")
    items = [MessageItem(role="user", content=input_)] if isinstance(input_, str) else input_
    return [_listed(item, f"{ulid}_in{number}") for number, item in enumerate(items)]


def _add_item(messages: list[dict[str, Any]], item: InputItem) -> None:
    match item:
        case MessageItem():
            role = "system" if item.role == "developer" else item.role
            messages.append({"role": role, "content": text_of(item.content)})
        case FunctionCallItem():
            _add_call(messages, item.call_id, item.name, item.arguments)
        case FunctionCallOutputItem():
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": text_of(item.output)})


def _add_call(messages: list[dict[str, Any]], call_id: str, name: str, arguments: str) -> None:
    """Add a call to the assistant message before it, or to a new one."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    calls = (*(messages[-1].get("tool_calls") or ()), {"id": call_id, "name": name, "arguments": arguments})
    messages[-1]["tool_calls"] = calls


def text_of(content: ResponseContent) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(part.text or part.refusal or "" for part in content)


_ID_PREFIXES = {"message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}


def _listed(item: InputItem, suffix: str) -> dict[str, Any]:
    listed: dict[str, Any] = item.model_dump(mode="json", exclude_none=True)
    listed.setdefault("id", f"{_ID_PREFIXES[listed['type']]}_{suffix}")
    listed.setdefault("status", "completed")
    match item:
        case MessageItem():
            parts = (
                [ResponseContentPart(type="text", text=item.content)] if isinstance(item.content, str) else item.content
            )
            show = _said if item.role == "assistant" else _sent
            listed["content"] = [show(part) for part in parts]
        case FunctionCallOutputItem() if not isinstance(item.output, str):
            listed["output"] = [_sent(part) for part in item.output]
        case ReasoningItem():
            listed.setdefault("summary", [])
    return listed


def _said(part: ResponseContentPart) -> dict[str, Any]:
    """A part of an assistant's message. Its logprobs are left out, as they are not part of the input."""
    if part.type == "refusal":
        return {"type": "refusal", "refusal": text_of([part])}
    return {"type": "output_text", "text": text_of([part]), "annotations": part.annotations or []}


def _sent(part: ResponseContentPart) -> dict[str, Any]:
    return {"type": "input_text", "text": text_of([part])}


SCHEMA_PLACE = "text.format.schema"


def to_generation_request(
    body: ResponseBody, view: ModelView, context: Sequence[dict[str, Any]] = ()
) -> GenerationRequest:
    """`view` is that of the body's model, `context` the messages of the conversation so far. Raises InvalidRequest."""
    try:
        return _generation_request(body, view, context)
    except InvalidRequest as exc:
        if (exc.param or "").startswith("messages"):
            # Items do not correspond to messages one to one, so an index of a message would be misleading.
            exc.message, exc.param = exc.message.replace(str(exc.param), "input", 1), "input"
        raise with_body_names(exc, spelling_of(body)) from None


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
