"""Responses: a job as a response object, and the schemas of its items."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, NotRequired, cast

from pydantic import Field

from dialects.openai_response_items import ItemStatus, Phase
from dialects.openai_response_output import ResponseOutput
from dialects.openai_response_requests import ResponseBody
from dialects.openai_response_tools import ResponseAllowedTools, ResponseFunctionTool, ResponseNamedTool
from dialects.openai_views import (
    ResponseUsageView,
    ServiceTierName,
    TokenLogprobView,
    View,
    count_reasoning_tokens,
    response_usage,
    tier_of,
)
from domain.errors import DeadlineExceeded
from domain.jobs import FinishReason, JobStatus, external_id
from domain.requests import NO_BOUND, Effort, GenerationRequest, GenerationResult, JobOutput
from storage.job_queries import JobRecord
from storage.tables import Job
from text.outputs import OutputParser

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
                "failed",
                error=_error(
                    job.error.code if job.error else DeadlineExceeded.code,
                    "its time was over before there was any output",
                ),
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
