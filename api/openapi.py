"""The OpenAPI document: the security scheme, the error responses, and helpers with which routes declare their bodies.

Our own code parses bodies and query strings (docs/adr/0031 says why), so routes declare them by hand. The `$defs` of
their schemas are moved to the components of the document.
"""

from typing import Any, Final

import orjson
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field

from dialects.openai_views import REFERENCE, View

NEEDS_KEY: Final[dict[str, Any]] = {"security": [{"key": []}]}
_KEY_SCHEME = {"key": {"type": "http", "scheme": "bearer", "description": "Not needed if CELERIAC_AUTH is none."}}


EVENTS: Final[dict[str, Any]] = {"content": {"text/event-stream": {}}, "description": "Server-sent events."}
BYTES: Final[dict[str, Any]] = {
    "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
}
TEXT: Final[dict[str, Any]] = {"content": {"text/plain": {"schema": {"type": "string"}}}}


class ErrorDetail(BaseModel):
    model_config = ConfigDict(extra="forbid")

    message: str = Field(description="What is wrong, with the value seen and the remedy.")
    type: str
    param: str | None = Field(description="The field that the error is about.")
    code: str = Field(description="A stable identifier of the error, for programs.")


class ErrorView(BaseModel):
    """The body of every error, on every route."""

    model_config = ConfigDict(extra="forbid")

    error: ErrorDetail
    request_id: str | None
    predicted_wait_seconds: float = Field(
        default=0.0, description="Only of deadline_unattainable: how long the job would have waited."
    )


#: By reference: with `model`, FastAPI would build the schema again for each status of each route, which would take half
#: a second at every start of the API.
ERROR: Final[dict[str, Any]] = {
    "content": {"application/json": {"schema": {"$ref": REFERENCE.format(model="ErrorView")}}}
}

#: The errors that any private route may answer. 500 is not listed: it means a bug, or a failed job.
REFUSALS: Final[dict[int | str, dict[str, Any]]] = {
    status: {"description": description, **ERROR}
    for status, description in {
        400: "The request is malformed or has an invalid value.",
        401: "The key is missing, unknown or revoked.",
        403: "The key may not do this.",
        404: "The object does not exist, or belongs to another tenant.",
        408: "The body arrived too slowly.",
        410: "The job was cancelled, or the cursor has expired.",
        413: "The body is too large.",
        415: "The body is not JSON, or is compressed.",
        422: "The request is well formed, but refused permanently.",
        429: "A limit of the key or tenant is reached, and `code` says which; retry after Retry-After.",
        503: "The server is overloaded or its database is unavailable; retry after Retry-After.",
        504: "The deadline passed before the job was done.",
    }.items()
}


def request_body(model: type[BaseModel], *, is_required: bool = True) -> dict[str, Any]:
    """Declare the JSON body of a route: its `openapi_extra`."""
    content = {"application/json": {"schema": model.model_json_schema(ref_template=REFERENCE)}}
    return {"requestBody": {"required": is_required, "content": content}}


def streamed_or(model: type[View]) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that answers with a `model` or, if the body asks for it, with server-sent events."""
    return {200: {"model": model, **EVENTS}}


def document_of(app: FastAPI) -> dict[str, Any]:
    """The complete document, as JSON objects that the caller owns."""
    document: dict[str, Any] = orjson.loads(orjson.dumps(app.openapi()))  # a copy, as FastAPI keeps its own
    if app.state.root_path:
        document["servers"] = [{"url": app.state.root_path}]
    components = document.setdefault("components", {})
    components["securitySchemes"] = _KEY_SCHEME
    schemas = components.setdefault("schemas", {})
    schemas["ErrorView"] = ErrorView.model_json_schema(ref_template=REFERENCE)
    _move_definitions([document["paths"], schemas["ErrorView"]], schemas)
    return document


def _move_definitions(part: Any, schemas: dict[str, Any]) -> None:
    """Move every `$defs` in `part` to `schemas`, where the references already point."""
    if isinstance(part, dict):
        for name, schema in part.pop("$defs", {}).items():
            assert schemas.setdefault(name, schema) == schema, f"two schemas are called {name}; rename one"
        part = list(part.values())
    if isinstance(part, list):
        for item in part:
            _move_definitions(item, schemas)
