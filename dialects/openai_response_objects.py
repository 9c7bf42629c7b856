"""Responses: a job as a response object, with its output items and its stream events.

Items and events are derived only from the job's chunks. So a stream that is read again has the same events with the
same numbers, and a client that resumes it gets each of them exactly once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NotRequired, cast
from uuid import UUID

from pydantic import Field

from dialects.openai_response_items import ItemStatus, Phase
from dialects.openai_response_requests import ResponseBody
from dialects.openai_response_tools import ResponseAllowedTools, ResponseFunctionTool, ResponseNamedTool
from dialects.openai_views import (
    ResponseUsageView,
    ServiceTierName,
    TokenLogprobView,
    View,
    content_logprobs,
    count_reasoning_tokens,
    response_usage,
    tier_of,
)
from domain.errors import DeadlineExceeded
from domain.jobs import FinishReason, JobStatus, external_id
from domain.requests import NO_BOUND, Effort, GenerationRequest, GenerationResult, JobOutput, TokenLogprob
from storage.job_queries import JobRecord
from storage.tables import Job
from text.outputs import CallArguments, CallName, ContentPiece, OutputParser, Piece, ReasoningPiece

Status = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]


class InputTextView(View):
    type: Literal["input_text"]
    text: str


class OutputTextView(View):
    type: Literal["output_text"]
    text: str
    annotations: list[dict[str, Any]]
    logprobs: NotRequired[Annotated[list[TokenLogprobView] | None, Field(description="Always empty for input items.")]]


class RefusalView(View):
    type: Literal["refusal"]
    refusal: str


class ReasoningTextView(View):
    type: Literal["reasoning_text"]
    text: str


class SummaryTextView(View):
    type: Literal["summary_text"]
    text: str


class ItemView(View):
    id: str
    status: ItemStatus


class OutputMessageView(ItemView):
    type: Literal["message"]
    role: Literal["assistant"]
    content: list[Annotated[OutputTextView | RefusalView, Field(discriminator="type")]]
    phase: NotRequired[Phase | None]


class ReasoningView(ItemView):
    type: Literal["reasoning"]
    summary: list[SummaryTextView]
    content: NotRequired[list[ReasoningTextView] | None]


class FunctionCallView(ItemView):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class InputMessageView(ItemView):
    type: Literal["message"]
    role: Literal["system", "developer", "user"]
    content: list[InputTextView]
    phase: NotRequired[Phase | None]


class FunctionCallOutputView(ItemView):
    type: Literal["function_call_output"]
    call_id: str
    output: str | list[InputTextView]


OutputItemView = Annotated[OutputMessageView | ReasoningView | FunctionCallView, Field(discriminator="type")]


class CompactionView(View):
    id: str
    type: Literal["compaction"]
    encrypted_content: Annotated[str, Field(description="Sealed, not secret: send it back unchanged.")]


InputItemView = (
    InputMessageView | OutputMessageView | ReasoningView | FunctionCallView | FunctionCallOutputView | CompactionView
)


class InputItemListView(View):
    object: Literal["list"]
    data: list[InputItemView]
    first_id: Annotated[str, Field(description="An empty string on an empty page.")]
    last_id: str
    has_more: bool


class InputTokensView(View):
    object: Literal["response.input_tokens"]
    input_tokens: int


class ResponseErrorView(View):
    code: Literal["server_error"]
    message: str
    type: Annotated[str, Field(description="Our error code.")]


class IncompleteDetailsView(View):
    reason: Literal["max_output_tokens"] | None
    stop_reason: NotRequired[Literal["deadline"] | None]


class ResponseToolView(View):
    type: Literal["function"]
    name: str
    description: str | None
    parameters: dict[str, Any] | None
    strict: bool | None


class NamedToolView(View):
    type: Literal["function"]
    name: str


class PlainFormatView(View):
    type: Literal["text", "json_object"]


class JsonSchemaFormatView(View):
    type: Literal["json_schema"]
    name: str
    schema: dict[str, Any]
    description: NotRequired[str | None]
    strict: NotRequired[bool | None]


class ResponseTextView(View):
    format: Annotated[PlainFormatView | JsonSchemaFormatView, Field(discriminator="type")]


class ReasoningConfigView(View):
    effort: Effort | None
    summary: None


class ConversationNameView(View):
    id: str


class ResponseView(View):
    id: str
    object: Literal["response"]
    created_at: Annotated[int, Field(description="Seconds since 1970.")]
    status: Status
    background: bool
    completed_at: int | None
    error: ResponseErrorView | None
    incomplete_details: IncompleteDetailsView | None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputItemView]
    parallel_tool_calls: bool
    previous_response_id: str | None
    conversation: ConversationNameView | None
    reasoning: ReasoningConfigView
    safety_identifier: str | None
    prompt_cache_key: str | None
    service_tier: ServiceTierName
    store: bool
    temperature: float | None
    text: ResponseTextView
    tool_choice: Literal["none", "auto", "required"] | NamedToolView
    tools: list[ResponseToolView]
    top_logprobs: int
    top_p: float | None
    presence_penalty: float
    frequency_penalty: float
    truncation: Literal["disabled"]
    usage: Annotated[ResponseUsageView | None, Field(description="Only present in a response that has ended.")]
    user: str | None


OutputItem = dict[str, Any]

ResponseEvent = dict[str, Any]  # with its `type`, without its `sequence_number`


class ResponseOutput:
    """Builds a response's items and events: `push` a job's text in order, then `finish`. `items` are those so far."""

    def __init__(self, job_id: UUID, parser: OutputParser) -> None:
        self.items: list[OutputItem] = []
        self._ulid = external_id(job_id, "resp").removeprefix("resp_")
        self.parser = parser
        self._is_open = False  # whether the last of `items` may still grow

    def push(self, text: str, logprobs: Sequence[TokenLogprob] | None = None) -> Iterator[ResponseEvent]:
        """`logprobs` are attached to the first visible text of their chunk."""
        tokens = content_logprobs(logprobs or ())
        for piece in self.parser.push(text):
            yield from self._grow(piece, tokens)
            tokens = [] if isinstance(piece, ContentPiece) else tokens
        if tokens and self._is_open and self.items[-1]["type"] == "message":
            yield from self._grow(ContentPiece(""), tokens)

    def finish(self, status: str) -> Iterator[ResponseEvent]:
        """The text has ended; `status` is `completed` or `incomplete`. A completed text is a message, even if empty."""
        for piece in self.parser.finish(is_cut=status != "completed"):
            yield from self._grow(piece, [])
        if not self.items and status == "completed":
            yield from self._open(self._new_message())
        yield from self._close(status)

    def _grow(self, piece: Piece, tokens: Sequence[TokenLogprobView]) -> Iterator[ResponseEvent]:
        match piece:
            case ContentPiece(text):
                yield from self._continue("message", self._new_message)
                yield self._add_text(text, tokens)
            case ReasoningPiece(text):
                yield from self._continue("reasoning", self._new_reasoning)
                yield self._add_thought(text)
            case CallName(_, name):
                yield from self._open(self._new_call(name))
            case CallArguments(_, text):
                yield self._add_arguments(text)

    def _continue(self, kind: str, new: "Any") -> Iterator[ResponseEvent]:
        if not (self._is_open and self.items[-1]["type"] == kind):
            yield from self._open(new())

    def _open(self, item: OutputItem) -> Iterator[ResponseEvent]:
        """Open an item, which completes the one before it."""
        yield from self._close("completed")
        self.items.append(item)
        self._is_open = True
        begun = item | ({"content": []} if "content" in item else {})
        yield {"type": "response.output_item.added", "output_index": self._index, "item": begun}
        if "content" in item:
            yield self._about_part("response.content_part.added", part=dict(item["content"][0]))

    def _close(self, status: str) -> Iterator[ResponseEvent]:
        if not self._is_open:
            return
        self._is_open = False
        item = self.items[-1]
        item["status"] = status
        if item["type"] == "function_call":
            arguments = {"name": item["name"], "arguments": item["arguments"]}
            yield self._about_item("response.function_call_arguments.done", **arguments)
        else:
            part = item["content"][0]
            is_text = part["type"] == "output_text"
            done = "response.output_text.done" if is_text else "response.reasoning_text.done"
            logprobs = {"logprobs": part["logprobs"]} if is_text else {}
            yield self._about_part(done, text=part["text"], **logprobs)
            yield self._about_part("response.content_part.done", part=dict(part))
        yield {"type": "response.output_item.done", "output_index": self._index, "item": dict(item)}

    def _add_text(self, text: str, tokens: Sequence[TokenLogprobView]) -> ResponseEvent:
        part = self.items[-1]["content"][0]
        part["text"] += text
        part["logprobs"] = [*part["logprobs"], *tokens]
        return self._about_part("response.output_text.delta", delta=text, logprobs=tokens)

    def _add_thought(self, text: str) -> ResponseEvent:
        self.items[-1]["content"][0]["text"] += text
        return self._about_part("response.reasoning_text.delta", delta=text)

    def _add_arguments(self, text: str) -> ResponseEvent:
        self.items[-1]["arguments"] += text
        return self._about_item("response.function_call_arguments.delta", delta=text)

    @property
    def _index(self) -> int:
        return len(self.items) - 1

    def _about_item(self, kind: str, **fields: object) -> ResponseEvent:
        return {"type": kind, "item_id": self.items[-1]["id"], "output_index": self._index, **fields}

    def _about_part(self, kind: str, **fields: object) -> ResponseEvent:
        return self._about_item(kind, content_index=0, **fields)

    def _new_id(self, prefix: str) -> str:
        return f"{prefix}_{self._ulid}_{len(self.items)}"

    def _new_message(self) -> OutputItem:
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        head = {"id": self._new_id("msg"), "type": "message", "role": "assistant", "status": "in_progress"}
        return head | {"content": [part]}

    def _new_reasoning(self) -> OutputItem:
        part = {"type": "reasoning_text", "text": ""}
        head = {"id": self._new_id("rs"), "type": "reasoning", "status": "in_progress"}
        return head | {"summary": [], "content": [part]}

    def _new_call(self, name: str) -> OutputItem:
        ids = {"id": self._new_id("fc"), "call_id": self._new_id("call")}
        return ids | {"type": "function_call", "status": "in_progress", "name": name, "arguments": ""}


@dataclass(frozen=True, slots=True)
class Ending:
    """The status of a response, with the reason for it."""

    status: Status
    error: ResponseErrorView | None = None
    incomplete_details: IncompleteDetailsView | None = None

    @property
    def item_status(self) -> ItemStatus:
        return "completed" if self.status == "completed" else "incomplete"


def ending_of(job: Job) -> Ending:
    """The status and, if the job has ended, the reason."""
    match job.status:
        case JobStatus.COMPLETED if job.finish_reason is FinishReason.LENGTH:
            return Ending("incomplete", incomplete_details={"reason": "max_output_tokens"})
        case JobStatus.EXPIRED if job.num_committed_tokens:
            # OpenAI has no such reason; clients that know only its reasons see an incomplete response.
            return Ending("incomplete", incomplete_details={"reason": None, "stop_reason": "deadline"})
        case JobStatus.EXPIRED:
            return Ending(
                "failed", error=_error(DeadlineExceeded.code, "the deadline passed before there was any output")
            )
        case JobStatus.FAILED:
            error = job.error
            return Ending("failed", error=_error(error.code, error.message) if error else _error("server_error", ""))
    return Ending(_STATUS[job.status])


#: The statuses that need no further detail.
_STATUS: dict[JobStatus, Status] = {
    JobStatus.QUEUED: "queued",
    JobStatus.IN_PROGRESS: "in_progress",
    JobStatus.COMPLETED: "completed",
    JobStatus.CANCELLED: "cancelled",
}


def from_result(record: JobRecord, body: ResponseBody, parser: OutputParser) -> ResponseView:
    """The response of a job that has ended. `record` must include its request."""
    ending = ending_of(record.job)
    output = ResponseOutput(record.job.id, parser)
    for choice in record.result.choices if isinstance(record.result, GenerationResult) else ():
        list(output.push(choice.text, choice.logprobs))
    list(output.finish(ending.item_status))
    return response_object(record, body, ending, output)


def response_object(record: JobRecord, body: ResponseBody, ending: Ending, output: ResponseOutput) -> ResponseView:
    """`record` must include its request. If the job has ended, `output` must have all of its text, for the usage."""
    job, request = record.job, record.request
    assert isinstance(request, GenerationRequest)
    has_ended = ending.status not in ("queued", "in_progress")
    finished = job.finished_at if has_ended else None
    return {
        "id": external_id(job.id, "resp"),
        "object": "response",
        "created_at": int(job.created_at.timestamp()),
        "status": ending.status,
        "background": bool(body.background),
        "completed_at": int(finished.timestamp()) if finished and ending.status == "completed" else None,
        "error": ending.error,
        "incomplete_details": ending.incomplete_details,
        "instructions": body.instructions,
        "max_output_tokens": None if body.max_output_tokens == NO_BOUND else body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "metadata": job.job_metadata,
        "model": job.model_name,
        "output": cast(list[OutputItemView], output.items),
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "conversation": None if body.conversation_id is None else {"id": body.conversation_id},
        "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
        "safety_identifier": body.safety_identifier,
        "prompt_cache_key": body.prompt_cache_key,
        "service_tier": tier_of(body.service_tier, job.priority),
        "store": body.is_stored,
        "temperature": request.params.temperature if body.temperature is None else body.temperature,
        "text": {"format": _format(body)},
        "tool_choice": _tool_choice(body),
        "tools": _tools(body),
        "top_logprobs": body.top_logprobs or 0,
        "top_p": request.params.top_p if body.top_p is None else body.top_p,
        "presence_penalty": request.params.presence_penalty,
        "frequency_penalty": request.params.frequency_penalty,
        "truncation": "disabled",
        "usage": response_usage_of(record.result, output.parser) if has_ended and record.result else None,
        "user": body.user,
    }


def _tools(body: ResponseBody) -> list[ResponseToolView]:
    tools = [tool for tool in body.tools or () if isinstance(tool, ResponseFunctionTool)]
    return [cast(ResponseToolView, tool.model_dump()) for tool in tools]


def _tool_choice(body: ResponseBody) -> Literal["none", "auto", "required"] | NamedToolView:
    if isinstance(body.tool_choice, ResponseNamedTool):
        return {"type": "function", "name": body.tool_choice.name}
    return body.tool_choice.mode if isinstance(body.tool_choice, ResponseAllowedTools) else body.tool_choice or "auto"


def _format(body: ResponseBody) -> PlainFormatView | JsonSchemaFormatView:
    if body.text is None or body.text.format is None:
        return {"type": "text"}
    return cast(JsonSchemaFormatView, body.text.format.model_dump(by_alias=True, exclude_none=True))


def _error(code: str, message: str) -> ResponseErrorView:
    """Clients know only a few codes, none of them ours, so our code becomes the type."""
    return {"code": "server_error", "message": message or "the job failed without an error message", "type": code}


def response_usage_of(result: JobOutput, parser: OutputParser) -> ResponseUsageView:
    choices = result.choices if isinstance(result, GenerationResult) else ()
    return response_usage(result.usage, num_reasoning_tokens=count_reasoning_tokens(choices, [parser]))
