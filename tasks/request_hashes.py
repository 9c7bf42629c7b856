"""What makes two requests the same: to an idempotency key, and to an engine."""

import hashlib
from collections.abc import Sequence
from typing import Any

import orjson
from pydantic import BaseModel

from domain.embeddings import EmbeddingRequest
from domain.kinds import JobRequest
from domain.requests import SamplingParams
from tasks.job_options import JobOptions


def request_hash(request: JobRequest, options: JobOptions) -> bytes:
    """What two submissions under one idempotency key must share: all that was asked for, before defaults and seed."""
    asked = _asked(request) | {
        "options": [
            options.priority,
            options.deadline_at,
            options.start_timeout_seconds,
            options.run_timeout_seconds,
            options.result_ttl_seconds,
            options.metadata,
        ],
        "endpoint": [options.endpoint, options.is_stored],
        "webhook": options.webhook_url and [options.webhook_url, *options.webhook_statuses],
    }
    return hashlib.sha256(orjson.dumps(asked, option=orjson.OPT_SORT_KEYS)).digest()


def _dump(part: BaseModel) -> dict[str, Any]:
    return part.model_dump(mode="json", exclude_defaults=True)


def fingerprint(model_revision: str, prompt_token_ids: Sequence[int], request: JobRequest) -> bytes:
    """What makes a request the same to an engine: by this a poisonous one is known again. The seed is that which was
    asked for, not one that was drawn."""
    asked: list[object] = [model_revision, list(prompt_token_ids)]
    if isinstance(request, EmbeddingRequest):
        asked += ["embedding", request.dimensions]
    else:
        asked += [request.params.model_dump(mode="json"), _schema_text(request.params)]
    return hashlib.sha256(orjson.dumps(asked, option=orjson.OPT_SORT_KEYS)).digest()


def _asked(request: JobRequest) -> dict[str, object]:
    if isinstance(request, EmbeddingRequest):
        return request.model_dump(mode="json")
    return {
        "model": request.model,
        "prompt": request.prompt,
        "messages": request.messages and [_dump(message) for message in request.messages],
        "tools": [orjson.dumps(_dump(tool)).decode() for tool in request.tools],  # as text: the order is seen, too
        "parallel_tool_calls": request.parallel_tool_calls,
        "prompt_token_ids": request.prompt_token_ids,
        "params": request.params.model_dump(mode="json"),
        "schema_order": _schema_text(request.params),
    }


def _schema_text(params: SamplingParams) -> str | None:
    """The order of a schema's properties, which sorted keys hide, is the order of the output."""
    output = params.structured_output
    if output is None or (output.json_schema is None and output.calls is None):
        return None
    if output.calls is None:
        return orjson.dumps(output.json_schema).decode()
    return orjson.dumps([output.json_schema, output.calls.model_dump(mode="json")]).decode()
