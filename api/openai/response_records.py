"""Stored responses: found, read as they stand, and as the beginning of the next one."""

from collections.abc import Collection
from typing import Any
from uuid import UUID

from api.events import read_all_chunks
from api.services import Services
from dialects.openai_response_items import add_output
from dialects.openai_response_objects import ResponseView, ending_of, from_result, response_object
from dialects.openai_response_output import ResponseOutput
from dialects.openai_response_requests import ResponseBody
from domain.errors import InvalidRequest, JobNotFound, ModelNotFound, PreviousResponseNotFound
from domain.jobs import Endpoint, parse_id
from domain.requests import GenerationRequest
from storage import job_queries
from storage.job_queries import JobRecord
from text.outputs import OutputFormat, OutputParser
from text.parsers import parser_of


async def find_response(
    services: Services, tenant_id: UUID, response_id: str, passing: Collection[UUID] = ()
) -> JobRecord:
    """The job of a response that is stored or among `passing`, with its request. Raises JobNotFound, with the same
    message for a malformed id, one of another tenant, and a job that is not such a response."""
    not_found = JobNotFound(
        f"there is no response {response_id[:64]!r}; it may have expired, or have been created with store=false",
        param="response_id",
    )
    try:
        id_ = parse_id(response_id)
    except ValueError:
        raise not_found from None
    record = await services.read(job_queries.get, id_, tenant_id, with_request=True)
    if record is None or record.job.endpoint is not Endpoint.RESPONSES:
        raise not_found
    if not record.job.is_stored and id_ not in passing:
        raise not_found
    return record


def body_of(record: JobRecord) -> ResponseBody:
    """The body that the client sent. `record` must include its request."""
    assert record.endpoint_body is not None
    return ResponseBody.model_validate(record.endpoint_body)


def parser_for(services: Services, record: JobRecord) -> OutputParser:
    """A parser for the job's output; for plain text if its model is no longer served."""
    assert isinstance(record.request, GenerationRequest)
    try:
        format = services.views.output_format(record.job.model)
    except ModelNotFound:
        format = OutputFormat()
    return parser_of(record.request, format)


def as_it_ended(services: Services, record: JobRecord) -> ResponseView:
    """The response of a job that has ended."""
    return from_result(record, body_of(record), parser_for(services, record))


async def as_it_stands(services: Services, record: JobRecord) -> ResponseView:
    """The response in its current state, with the text so far."""
    if record.job.status.is_terminal:
        return as_it_ended(services, record)
    output = ResponseOutput(record.job.id, parser_for(services, record))
    chunks = await read_all_chunks(services, record.job.id)
    text = "".join(chunk.text for chunk in chunks)
    logprobs = [logprob for chunk in chunks for logprob in chunk.logprobs or ()]
    await services.large_work.run(len(text), lambda: list(output.push(text, logprobs)))
    return response_object(record, body_of(record), ending_of(record.job), output)


async def conversation_of(
    services: Services, tenant_id: UUID, response_id: str, passing: Collection[UUID] = ()
) -> list[dict[str, Any]]:
    """The messages and output of a completed response, as the start of the next conversation turn. Without its
    instructions, which apply to one response only. Raises InvalidRequest."""
    try:
        record = await find_response(services, tenant_id, response_id, passing)
    except JobNotFound as exc:
        raise PreviousResponseNotFound(exc.message, param="previous_response_id") from None
    previous = as_it_ended(services, record)
    if previous["status"] not in ("completed", "incomplete"):
        raise InvalidRequest(
            f"{previous['id']} is {previous['status']}; send the id of a completed response",
            param="previous_response_id",
        )
    assert isinstance(record.request, GenerationRequest)
    dumped = [message.model_dump(exclude_defaults=True) for message in record.request.messages or ()]
    messages = dumped[1:] if previous["instructions"] else dumped
    add_output(messages, previous["output"])
    return messages
