"""Translates Anthropic's Message Batches: the body into the lines of a batch file, our output files into results.

A Message Batch is a batch like any other, with lines for /v1/messages; docs/batches.md says how it runs.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from dialects.anthropic_answers import MessageView
from dialects.anthropic_errors import AnthropicErrorView, anthropic_error_body
from dialects.errors import HTTP_BY_CODE
from dialects.native import NO_NUL
from dialects.openai import OpenAIModel, TimeoutFields
from dialects.openai_batches import read_line
from dialects.openai_views import Timestamp, View
from domain.errors import CeleriacError, InvalidRequest
from domain.jobs import MAX_LINE_BYTES, MAX_LINES
from text.models import ModelViews

URL = "/v1/messages"

Outcome = Literal["succeeded", "errored", "canceled", "expired"]


class BatchedMessage(OpenAIModel):
    custom_id: Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=NO_NUL)]
    params: dict[str, Any]  # a body of /v1/messages


class MessageBatchBody(TimeoutFields):
    requests: Annotated[list[BatchedMessage], Field(min_length=1, max_length=MAX_LINES)]


class MessageBatchCountsView(View):
    """All requests count as processing until the batch has ended."""

    processing: int
    succeeded: int
    errored: int
    canceled: int
    expired: int


class MessageBatchView(View):
    id: str
    type: Literal["message_batch"]
    processing_status: Literal["in_progress", "canceling", "ended"]
    request_counts: MessageBatchCountsView
    created_at: Timestamp
    expires_at: Timestamp
    ended_at: Timestamp | None
    cancel_initiated_at: Timestamp | None
    archived_at: Timestamp | None
    results_url: str | None


class MessageBatchListView(View):
    data: list[MessageBatchView]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedMessageBatchView(View):
    id: str
    type: Literal["message_batch_deleted"]


class SucceededView(View):
    type: Literal["succeeded"]
    message: MessageView


class ErroredView(View):
    type: Literal["errored"]
    error: AnthropicErrorView


class NotRunView(View):
    type: Literal["canceled", "expired"]


class MessageBatchResultView(View):
    custom_id: str
    result: SucceededView | ErroredView | NotRunView


def to_lines(body: MessageBatchBody, views: ModelViews) -> bytes:
    """The batch file, in which every request is valid. Raises a CeleriacError that names the first invalid one."""
    lines: list[bytes] = []
    seen: set[str] = set()
    model: object = None
    for number, request in enumerate(body.requests):
        place = f"requests.{number}"
        if request.custom_id in seen:
            raise InvalidRequest(
                f"{place}.custom_id is {request.custom_id!r}, which an earlier request has, too; give each its own",
                param=f"{place}.custom_id",
            )
        seen.add(request.custom_id)
        lines.append(_line_of(request, place, views))
        model = model if number else request.params.get("model")
        if request.params.get("model") != model:
            raise InvalidRequest(
                f"{place}.params.model differs from that of the requests before it; put it into a separate batch",
                param=f"{place}.params.model",
            )
    return b"".join(lines)


def _line_of(request: BatchedMessage, place: str, views: ModelViews) -> bytes:
    line = {"custom_id": request.custom_id, "method": "POST", "url": URL, "body": request.params}
    content = json.dumps(line).encode()
    if len(content) > MAX_LINE_BYTES:
        raise InvalidRequest(f"{place} is longer than {MAX_LINE_BYTES} bytes; shorten it", param=place)
    try:
        read_line(content, URL, views)
    except CeleriacError as exc:
        path = f"{place}.params" + (exc.param or "").removeprefix("body")
        exc.message, exc.param = f"{place}.params: {exc.message}", path
        raise
    return content + b"\n"


def custom_ids_of(lines: Iterable[bytes]) -> Iterator[str]:
    return (str(json.loads(line)["custom_id"]) for line in lines)


def result_of(line: bytes) -> MessageBatchResultView:
    """Translate a line of our output or error file into one of Anthropic's results."""
    written = json.loads(line)
    custom_id, response = written["custom_id"], written["response"]
    if response is None:
        return {"custom_id": custom_id, "result": unanswered(_outcome_of(written["error"]["code"]))}
    if response["status_code"] == 200:
        return {"custom_id": custom_id, "result": {"type": "succeeded", "message": response["body"]}}
    error = response["body"]["error"]
    return {"custom_id": custom_id, "result": _errored(error["code"], error["message"], error["param"])}


def unanswered(outcome: Outcome) -> ErroredView | NotRunView:
    """The result of a request that was never run."""
    if outcome in ("canceled", "expired"):
        return {"type": "canceled" if outcome == "canceled" else "expired"}
    return _errored(CeleriacError.code, "the batch failed before this request was run; send it again", None)


def _outcome_of(code: str) -> Outcome:
    return "expired" if code == "batch_expired" else "canceled"


def _errored(code: str, message: str, param: str | None) -> ErroredView:
    known = code if code in HTTP_BY_CODE else CeleriacError.code
    error: Any = anthropic_error_body(known, message, param, None)
    return {"type": "errored", "error": error}


def counts_of(outcomes: Iterable[str], *, num_processing: int = 0) -> MessageBatchCountsView:
    counted: Mapping[str, int] = _counted(outcomes)
    return {
        "processing": num_processing,
        "succeeded": counted.get("succeeded", 0),
        "errored": counted.get("errored", 0),
        "canceled": counted.get("canceled", 0),
        "expired": counted.get("expired", 0),
    }


def _counted(outcomes: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for outcome in outcomes:
        counts[outcome] = counts.get(outcome, 0) + 1
    return counts
