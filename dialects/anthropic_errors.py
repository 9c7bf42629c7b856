"""Errors with Anthropic's shape and types: {"type": "error", "error": {"type", "message"}, "request_id"}.

The reference is https://platform.claude.com/docs/en/api/errors. Our own code and the field at fault are in `details`,
where Anthropic's SDKs look for an `error_code`.
"""

from typing import Any, Final, Literal, NotRequired

from dialects.errors import HTTP_BY_CODE, ErrorDialect, HttpError
from dialects.openai_views import View

OVERLOADED = 529

TYPE_BY_STATUS: Final = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    OVERLOADED: "overloaded_error",
}


class ErrorDetailsView(View):
    error_code: str
    param: NotRequired[str]


class AnthropicErrorDetailView(View):
    type: str
    message: str
    details: ErrorDetailsView


class AnthropicErrorView(View):
    type: Literal["error"]
    error: AnthropicErrorDetailView
    request_id: str | None


def anthropic_http_of(code: str) -> HttpError:
    """Status and type of an error. What is 503 on other routes (too busy, or something is down) is 529 here."""
    status = HTTP_BY_CODE[code].status
    status = OVERLOADED if status == 503 else status
    return HttpError(status, TYPE_BY_STATUS.get(status, "invalid_request_error" if status < 500 else "api_error"))


def anthropic_error_body(code: str, message: str, param: str | None, request_id: str | None) -> dict[str, Any]:
    details = {"error_code": code} | ({"param": param} if param is not None else {})
    error = {"type": anthropic_http_of(code).type, "message": message, "details": details}
    return {"type": "error", "error": error, "request_id": request_id}


ANTHROPIC_ERRORS: Final = ErrorDialect(anthropic_http_of, anthropic_error_body)
