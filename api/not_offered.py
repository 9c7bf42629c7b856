"""Routes of OpenAI that have no counterpart here: 501, and what there is instead. Behind the key."""

from typing import NoReturn

from fastapi import Request

from api.deps import private_router
from domain.errors import NotOffered

METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]

#: What stands below each of these, and what to use instead.
INSTEAD_BY_PREFIX = {
    "/v1/chat/completions/input_tokens": "count the same messages as the input of /v1/responses/input_tokens",
    "/v1/audio": "models here read and write text: transcribe elsewhere and send the text to /v1/chat/completions",
    "/v1/images": "models here read and write text: /v1/chat/completions",
    "/v1/fine_tuning": "train elsewhere and name the folder in models.toml",
    "/v1/responses/compact": "shorten the conversation yourself and send it to /v1/responses",
    "/v1/moderations": "ask a model for a verdict: /v1/chat/completions with a JSON schema as response_format",
    "/v1/assistants": "keep the conversation yourself and send it to /v1/chat/completions",
    "/v1/threads": "keep the conversation yourself and send it to /v1/chat/completions",
    "/v1/vector_stores": "keep vectors in a database of your own",
    "/v1/realtime": "follow a job as it runs: GET /v1/jobs/{job_id}/events",
}

router = private_router()


async def refuse(request: Request) -> NoReturn:
    path = request.url.path
    prefix = next(prefix for prefix in INSTEAD_BY_PREFIX if path == prefix or path.startswith(f"{prefix}/"))
    raise NotOffered(f"{prefix} is not offered here; {INSTEAD_BY_PREFIX[prefix]}")


for prefix in INSTEAD_BY_PREFIX:
    for path in (prefix, f"{prefix}/{{rest:path}}"):
        router.add_api_route(path, refuse, methods=METHODS, include_in_schema=False, response_model=None)
