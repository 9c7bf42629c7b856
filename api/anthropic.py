"""Anthropic's routes for messages, whole or streamed, and for counting the tokens of a prompt.

A message is a job like any other: `msg_01J…` and `job_01J…` are the same job, and a repeated request gets that job.
"""

from collections.abc import Mapping
from typing import Any, Final

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from api.errors import json_response
from api.inputs import off_loop, read_body, read_generation, read_model, require_json
from api.openai.answers import Framing, WholeAnswer, stream_answer
from api.openai.running import Asked, Run, start
from api.openapi import REFUSALS, request_body, streamed_or
from api.services import PrivateRoute, services_of
from api.sse import (
    frame,
)
from dialects.anthropic_answers import PING, MessageStream, MessageView, TokenCountView, from_result
from dialects.anthropic_errors import OVERLOADED, AnthropicErrorView
from dialects.anthropic_fields import ANTHROPIC_HINT_TREE
from dialects.anthropic_requests import MessagesBody, PromptBody, spelling_of, to_generation_request, to_prompt
from domain.errors import ContextLengthExceeded
from domain.jobs import Endpoint
from domain.requests import GenerationRequest
from text.models import ModelView

ANTHROPIC_REFUSALS: Final[dict[int | str, dict[str, Any]]] = {
    OVERLOADED if status == 503 else status: {**refusal, "model": AnthropicErrorView}
    for status, refusal in REFUSALS.items()
}

router = APIRouter(route_class=PrivateRoute, responses=ANTHROPIC_REFUSALS, tags=["Anthropic"])


def _named_frame(event: Mapping[str, object]) -> bytes:
    return frame(str(event["type"]), event)


FRAMING = Framing(frame_of=_named_frame, last_frame=b"", heartbeat=_named_frame(PING))


@router.post("/v1/messages", responses=streamed_or(MessageView), openapi_extra=request_body(MessagesBody))
async def create_message(request: Request) -> Response:
    """A message as Anthropic defines it, and a job like any other: `x-job-id` has its id for `/v1/jobs`."""
    require_json(request)
    content = await read_body(request)
    read = await read_generation(
        request, content, MessagesBody, to_generation_request, ANTHROPIC_HINT_TREE, has_default=False
    )
    body, generation, view = read.body, read.generation, read.view
    run = await _start(request, generation, _asked(body), view)
    if run.record is not None:
        run.services.known_bodies.note(read)
    if body.stream:
        return stream_answer(run, MessageStream(run, generation, body, view.output_format), FRAMING)
    return WholeAnswer([run], lambda records: from_result(records[0], generation, body, view.output_format))


@router.post(
    "/v1/messages/count_tokens",
    responses={200: {"model": TokenCountView}},
    openapi_extra=request_body(PromptBody),
)
async def count_message_tokens(request: Request) -> Response:
    """Exactly the number that the message itself would have, by the model's own chat template and tokenizer."""
    body = await read_model(request, PromptBody, ANTHROPIC_HINT_TREE)
    services = services_of(request)
    generation = await off_loop(request, to_prompt, body, services.views.get(body.model))
    return json_response({"input_tokens": await services.submitter.count_prompt_tokens(generation)})


def _asked(body: MessagesBody) -> Asked:
    return Asked(
        endpoint=Endpoint.MESSAGES,
        has_stream=bool(body.stream),
        metadata=body.job_metadata,
        spelling=spelling_of(body),
        use_cache=body.use_cache,
        timeouts=body.timeouts,
    )


async def _start(request: Request, generation: GenerationRequest, asked: Asked, view: ModelView) -> Run:
    """Start the job. If the context has no room for `max_tokens`, allow as many as it has room for: these clients
    always ask for a model's maximum, and the stop reason tells them when the context is full. Raises as `start`."""
    try:
        return await start(request, generation, asked)
    except ContextLengthExceeded as exc:
        if exc.param != "max_tokens":
            raise
    num_prompt_tokens = await services_of(request).submitter.count_prompt_tokens(generation)
    params = generation.params.model_copy(update={"max_tokens": view.max_model_len - num_prompt_tokens})
    return await start(request, generation.model_copy(update={"params": params}), asked)
