"""A job as a response."""

from dataclasses import dataclass
from typing import Any

from api.openai.output_parsing import OutputParser
from api.openai.response_output import ResponseOutput
from api.openai.response_schemas import ResponseBody, ResponseFunctionTool
from api.openai.schemas import tier_of
from api.openai.usage import count_reasoning_tokens, response_usage
from domain.errors import DeadlineExceeded
from domain.ids import external_id
from domain.jobs import FinishReason, JobStatus
from domain.kinds import JobOutput
from domain.requests import NO_BOUND, GenerationRequest, GenerationResult
from storage.job_queries import JobRecord
from storage.tables import Job


@dataclass(frozen=True, slots=True)
class Ending:
    """Where a response stands, in its own words."""

    status: str
    error: dict[str, Any] | None = None
    incomplete_details: dict[str, Any] | None = None

    @property
    def item_status(self) -> str:
        return "completed" if self.status == "completed" else "incomplete"


def ending_of(job: Job) -> Ending:
    """A job that is under way has not ended: its status alone."""
    match job.status:
        case JobStatus.COMPLETED if job.finish_reason is FinishReason.LENGTH:
            return Ending("incomplete", incomplete_details={"reason": "max_output_tokens"})
        case JobStatus.EXPIRED if job.num_committed_tokens:
            # No reason of OpenAI's says so; clients that know only theirs read a response that is not complete.
            return Ending("incomplete", incomplete_details={"reason": None, "stop_reason": "deadline"})
        case JobStatus.EXPIRED:
            return Ending("failed", error=_error(DeadlineExceeded.code, "the deadline passed before any output"))
        case JobStatus.FAILED:
            error = job.error
            return Ending("failed", error=_error(error.code, error.message) if error else _error("server_error", ""))
    return Ending(job.status.value)


def from_result(record: JobRecord, body: ResponseBody, parser: OutputParser) -> dict[str, Any]:
    """The response of a job that has ended. `record` comes with its request."""
    ending = ending_of(record.job)
    output = ResponseOutput(record.job.id, parser)
    for choice in record.result.choices if isinstance(record.result, GenerationResult) else ():
        list(output.push(choice.text, choice.logprobs))
    list(output.finish(ending.item_status))
    return response_object(record, body, ending, output)


def response_object(record: JobRecord, body: ResponseBody, ending: Ending, output: ResponseOutput) -> dict[str, Any]:
    """`record` comes with its request. Usage is known when the job has ended with a result, all in `output`."""
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
        "model": job.model,
        "output": output.items,
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": body.safety_identifier,
        "prompt_cache_key": body.prompt_cache_key,
        "service_tier": tier_of(body.service_tier, job.priority),
        "store": body.is_stored,
        "temperature": request.params.temperature if body.temperature is None else body.temperature,
        "text": {"format": _format(body)},
        "tool_choice": _tool_choice(body),
        "tools": [tool.model_dump() for tool in body.tools or () if isinstance(tool, ResponseFunctionTool)],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": request.params.top_p if body.top_p is None else body.top_p,
        "presence_penalty": request.params.presence_penalty,
        "frequency_penalty": request.params.frequency_penalty,
        "truncation": "disabled",
        "usage": _usage(record.result, output.parser) if has_ended and record.result else None,
        "user": body.user,
    }


def _tool_choice(body: ResponseBody) -> str | dict[str, Any]:
    if body.tool_choice is None or isinstance(body.tool_choice, str):
        return body.tool_choice or "auto"
    return body.tool_choice.model_dump()


def _format(body: ResponseBody) -> dict[str, Any]:
    if body.text is None or body.text.format is None:
        return {"type": "text"}
    return body.text.format.model_dump(by_alias=True, exclude_none=True)


def _error(code: str, message: str) -> dict[str, Any]:
    """Clients know a few codes only, none of them ours: ours is the type."""
    return {"code": "server_error", "message": message or "the job failed without a word", "type": code}


def _usage(result: JobOutput, parser: OutputParser) -> dict[str, Any]:
    choices = result.choices if isinstance(result, GenerationResult) else ()
    return response_usage(result.usage, num_reasoning_tokens=count_reasoning_tokens(choices, [parser]))
