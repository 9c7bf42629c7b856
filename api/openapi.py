"""The OpenAPI document: what FastAPI writes from the routes, and what is the same for all of them.

Bodies and query strings are read by our own code (docs/adr/0031 says why), so routes declare them by hand; the
definitions of their schemas move to where the document keeps all of them.
"""

from typing import Any, Final

import orjson
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field

from dialects.openai_views import REFERENCE, View

NEEDS_KEY: Final[dict[str, Any]] = {"security": [{"key": []}]}
_KEY_SCHEME = {"key": {"type": "http", "scheme": "bearer", "description": "Not asked for under CELERIAC_AUTH=none."}}


EVENTS: Final[dict[str, Any]] = {"content": {"text/event-stream": {}}, "description": "Server-sent events."}
BYTES: Final[dict[str, Any]] = {
    "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
}
TEXT: Final[dict[str, Any]] = {"content": {"text/plain": {"schema": {"type": "string"}}}}


class ErrorDetail(BaseModel):
    model_config = ConfigDict(extra="forbid")

    message: str = Field(description="What is wrong, with the value seen and the remedy.")
    type: str
    param: str | None = Field(description="The field that is wrong.")
    code: str = Field(description="Stable; made for programs.")


class ErrorView(BaseModel):
    """Every refusal, on every route."""

    model_config = ConfigDict(extra="forbid")

    error: ErrorDetail
    request_id: str | None


#: By reference. With `model`, FastAPI would build the schema anew for each status of each route, which takes a start
#: of the API half a second.
ERROR: Final[dict[str, Any]] = {
    "content": {"application/json": {"schema": {"$ref": REFERENCE.format(model="ErrorView")}}}
}

#: What a private route may answer instead of what was asked for. 500 is none of it: that is a bug, or a job's failure.
REFUSALS: Final[dict[int | str, dict[str, Any]]] = {
    status: {"description": description, **ERROR}
    for status, description in {
        400: "The request is not understood, or asks for what cannot be.",
        401: "The key is missing, unknown or revoked.",
        403: "The key may not do this.",
        404: "There is no such thing, or it is another tenant's.",
        408: "The body came too slowly.",
        410: "It was there and is not any more: the stream's cursor, or a job that was cancelled.",
        413: "The body is too large.",
        415: "The body is no JSON, or compressed.",
        422: "The request is well formed, and refused for good.",
        429: "Too much is queued; come back after Retry-After.",
        503: "The server or its database is too busy or away; come back after Retry-After.",
        504: "The job's deadline came first.",
    }.items()
}


def request_body(model: type[BaseModel], *, is_required: bool = True) -> dict[str, Any]:
    """The JSON body of a route, for its `openapi_extra`."""
    content = {"application/json": {"schema": model.model_json_schema(ref_template=REFERENCE)}}
    return {"requestBody": {"required": is_required, "content": content}}


def streamed_or(model: type[View]) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route that answers with a `model`, or with server-sent events where the body asks for them."""
    return {200: {"model": model, **EVENTS}}


def document_of(app: FastAPI) -> dict[str, Any]:
    """The whole document."""
    document: dict[str, Any] = orjson.loads(orjson.dumps(app.openapi()))  # a copy: the routes keep theirs
    components = document.setdefault("components", {})
    components["securitySchemes"] = _KEY_SCHEME
    schemas = components.setdefault("schemas", {})
    schemas["ErrorView"] = ErrorView.model_json_schema(ref_template=REFERENCE)
    _move_definitions([document["paths"], schemas["ErrorView"]], schemas)
    return document


def _move_definitions(part: Any, schemas: dict[str, Any]) -> None:
    """Take every `$defs` below `part` into `schemas`, where the references point already."""
    if isinstance(part, dict):
        for name, schema in part.pop("$defs", {}).items():
            assert schemas.setdefault(name, schema) == schema, f"two schemas are called {name}; rename one"
        part = list(part.values())
    if isinstance(part, list):
        for item in part:
            _move_definitions(item, schemas)
