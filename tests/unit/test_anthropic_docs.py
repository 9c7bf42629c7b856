"""docs/anthropic.md lists parameters, and what is taken and named; refusals have the names of Anthropic."""

import pytest

from api.errors import error_dialect_context, error_response
from dialects.anthropic_errors import ANTHROPIC_ERRORS
from dialects.anthropic_fields import ANTHROPIC_HINTS, FOREIGN_ANTHROPIC_TOOLS
from dialects.anthropic_requests import MessagesBody
from dialects.bodies import owner_at
from dialects.errors import HTTP_BY_CODE
from dialects.openai import Unsupported
from domain.errors import (
    AuthenticationFailed,
    CeleriacError,
    InvalidRequest,
    JobNotFound,
    NoWorkers,
    PermissionDenied,
    RequestTooLarge,
    TooManyQueuedJobs,
)
from settings import ROOT
from tests.unit.test_openai_docs import documented, hint_rows

#: Of the SDK's `ErrorType`, and of the reference's table.
TYPES = {
    *("invalid_request_error", "authentication_error", "permission_error", "not_found_error", "request_too_large"),
    *("rate_limit_error", "timeout_error", "api_error", "overloaded_error"),
}


def test_every_parameter_is_documented_as_it_is() -> None:
    said = documented("Parameters of messages", "anthropic.md")
    assert set(said) == set(MessagesBody.model_fields)
    fields = MessagesBody.model_fields.items()
    refused = {name for name, field in fields if field.metadata == list(Unsupported.__metadata__)}
    assert {name for name, text in said.items() if text == "refused"} == refused


def test_every_hint_is_documented_with_its_reason() -> None:
    page = (ROOT / "docs" / "anthropic.md").read_text()
    section = page.split("## What is taken and named\n")[1].split("\n## ")[0]
    assert [line for line in section.splitlines() if line.startswith("| ")][1:] == hint_rows(ANTHROPIC_HINTS)
    assert ", ".join(f"`{kind}`" for kind in sorted(FOREIGN_ANTHROPIC_TOOLS)) in section.replace("\n", " ")


def test_no_hint_takes_away_what_a_part_of_a_body_reads() -> None:
    for place in ANTHROPIC_HINTS:
        *outer, last = place.split(".")
        owner = owner_at(MessagesBody, [0 if step == "*" else step for step in outer]) if outer else None
        assert owner is None or last == "*" or last not in owner.model_fields, (place, owner)


@pytest.mark.parametrize("code", HTTP_BY_CODE)
def test_every_error_has_a_type_that_anthropics_clients_know(code: str) -> None:
    http = ANTHROPIC_ERRORS.http_of(code)
    assert http.type in TYPES
    assert http.status == {503: 529}.get(HTTP_BY_CODE[code].status, HTTP_BY_CODE[code].status)
    body = ANTHROPIC_ERRORS.body_of(code, "what happened", "field", "req_1")
    details = {"error_code": code, "param": "field"}
    assert body == {
        "type": "error",
        "error": {"type": http.type, "message": "what happened", "details": details},
        "request_id": "req_1",
    }


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (InvalidRequest("no"), 400, "invalid_request_error"),
        (AuthenticationFailed("no"), 401, "authentication_error"),
        (PermissionDenied("no"), 403, "permission_error"),
        (JobNotFound("no"), 404, "not_found_error"),
        (RequestTooLarge("no"), 413, "request_too_large"),
        (TooManyQueuedJobs("no"), 429, "rate_limit_error"),
        (CeleriacError("no"), 500, "api_error"),
        (NoWorkers("no"), 529, "overloaded_error"),
    ],
)
def test_statuses_and_types_are_the_references(error: CeleriacError, status: int, kind: str) -> None:
    token = error_dialect_context.set(ANTHROPIC_ERRORS)
    try:
        response = error_response(error)
    finally:
        error_dialect_context.reset(token)
    assert response.status_code == status
    assert f'"type":"{kind}"'.encode() in response.body
    assert ("retry-after" in response.headers) == (status in (429, 529))
