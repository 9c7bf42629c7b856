"""Responses that were created before: found by id, shown as they stand, and gone on from."""

from typing import Any
from uuid import UUID

from api.job_events import read_all_chunks
from api.openai.output_parsing import OutputParser, parser_of
from api.openai.response_input import add_output
from api.openai.response_objects import ending_of, from_result, response_object
from api.openai.response_output import ResponseOutput
from api.openai.response_schemas import ResponseBody
from api.services import Services
from domain.errors import InvalidRequest, JobNotFound, ModelNotFound, PreviousResponseNotFound
from domain.ids import parse_id
from domain.jobs import Endpoint
from domain.requests import GenerationRequest
from storage import job_queries
from storage.job_queries import JobRecord
from tasks.output_formats import OutputFormat


async def find_response(services: Services, tenant_id: UUID, response_id: str) -> JobRecord:
    """With its request. Raises JobNotFound: the same for a malformed id, another tenant's, and what is no stored
    response."""
    not_found = JobNotFound(
        f"there is no response {response_id[:64]!r}; it may have expired, or was created with store=false",
        param="response_id",
    )
    try:
        id_ = parse_id(response_id)
    except ValueError:
        raise not_found from None
    record = await services.read(job_queries.get, id_, tenant_id, with_request=True)
    if record is None or record.job.endpoint is not Endpoint.RESPONSES or not record.job.is_stored:
        raise not_found
    return record


def body_of(record: JobRecord) -> ResponseBody:
    """What the client sent. `record` comes with its request."""
    assert record.endpoint_body is not None
    return ResponseBody.model_validate(record.endpoint_body)


def parser_for(services: Services, record: JobRecord) -> OutputParser:
    """Of the job's output. A model that is served no more leaves plain text."""
    assert isinstance(record.request, GenerationRequest)
    try:
        format = services.views.output_format(record.job.model)
    except ModelNotFound:
        format = OutputFormat()
    return parser_of(record.request, format)


def as_it_ended(services: Services, record: JobRecord) -> dict[str, Any]:
    """The response of a job that has ended."""
    return from_result(record, body_of(record), parser_for(services, record))


async def as_it_stands(services: Services, record: JobRecord) -> dict[str, Any]:
    """With the text so far."""
    if record.job.status.is_terminal:
        return as_it_ended(services, record)
    output = ResponseOutput(record.job.id, parser_for(services, record))
    for chunk in await read_all_chunks(services, record.job.id):
        list(output.push(chunk.text, chunk.logprobs))
    return response_object(record, body_of(record), ending_of(record.job), output)


async def conversation_of(services: Services, tenant_id: UUID, response_id: str) -> list[dict[str, Any]]:
    """The messages of a completed response and its answer, as what comes next takes them up: instructions are of one
    response only. Raises InvalidRequest."""
    try:
        record = await find_response(services, tenant_id, response_id)
    except JobNotFound as exc:
        raise PreviousResponseNotFound(exc.message, param="previous_response_id") from None
    previous = as_it_ended(services, record)
    if previous["status"] not in ("completed", "incomplete"):
        raise InvalidRequest(
            f"{previous['id']} is {previous['status']}; go on from one that is completed", param="previous_response_id"
        )
    assert isinstance(record.request, GenerationRequest)
    dumped = [message.model_dump(exclude_defaults=True) for message in record.request.messages or ()]
    messages = dumped[1:] if previous["instructions"] else dumped
    add_output(messages, previous["output"])
    return messages
