"""POST /v1/jobs/{job_id}/stream_token: what a page sends instead of a key to read this job's stream.

A server asks for it with its own key and hands it to its page, which opens the stream at `url`.
"""

import time
from datetime import UTC, datetime
from typing import Literal

from pydantic import ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from api.errors import json_response
from api.inputs import off_loop, read_body, require_json
from api.jobs import find_job
from api.openapi import request_body
from api.root_path import link
from api.services import caller_of, private_router
from dialects.bodies import parse_model
from dialects.openai_views import Timestamp, View, timestamp
from domain.jobs import FirstErrorModel, external_id
from domain.stream_tokens import NO_KEY, StreamToken
from storage import tenants

router = private_router("Jobs")

DEFAULT_SECONDS = 900

MAX_SECONDS = 86_400


class StreamTokenBody(FirstErrorModel):
    """The body of POST .../stream_token, which is optional."""

    model_config = ConfigDict(extra="forbid")

    expires_in_seconds: int = Field(
        default=DEFAULT_SECONDS, ge=1, le=MAX_SECONDS, strict=True, description="How long the token is valid."
    )


class StreamTokenView(View):
    object: Literal["stream_token"]
    job_id: str
    token: str
    expires_at: Timestamp
    url: str  # relative to this server


@router.post(
    "/v1/jobs/{job_id}/stream_token",
    responses={200: {"model": StreamTokenView}},
    openapi_extra=request_body(StreamTokenBody, is_required=False),
)
async def create_stream_token(job_id: str, request: Request) -> Response:
    """A token for `?token=` of this job's `/events` and `/stream`, and of nothing else. It is valid until it expires or
    the key that asked for it is revoked; then streams that it opened end as well."""
    services, tenant_id = caller_of(request)
    raw = await read_body(request)
    if raw:
        require_json(request)
    body = await off_loop(request, parse_model, raw or b"{}", StreamTokenBody)
    record = await find_job(services, job_id, tenant_id, with_result=False)
    expires_at = int(time.time()) + body.expires_in_seconds
    claim = StreamToken(request.state.key_id or NO_KEY, record.job.id, expires_at)
    token = await services.read(tenants.sign, claim, tenant_id)
    id_ = external_id(record.job.id)
    answer = {
        "object": "stream_token",
        "job_id": id_,
        "token": token,
        "expires_at": timestamp(datetime.fromtimestamp(expires_at, UTC)),
        "url": link(request, f"/v1/jobs/{id_}/events?token={token}"),
    }
    return json_response(answer, headers={"cache-control": "no-store", "x-job-id": id_})
