"""POST /v1/chat/completions: messages in, a message out, whole or as it comes."""

from fastapi import Request
from starlette.responses import Response

from api.bodies import off_loop, read_model
from api.deps import private_router, services_of
from api.openai.answers import WholeAnswer
from api.openai.chat_output import ChatStream, from_result
from api.openai.chat_requests import spelling_of, to_generation_request
from api.openai.chat_schemas import ChatCompletionBody
from api.openai.hints import HINT_TREE
from api.openai.running import Asked, start
from api.openai.streaming import stream_answer
from api.openai.views import ChatCompletionView
from api.openapi import request_body, streamed_or
from domain.jobs import Endpoint

router = private_router()


@router.post(
    "/v1/chat/completions",
    responses=streamed_or(ChatCompletionView),
    openapi_extra=request_body(ChatCompletionBody),
)
async def create_chat_completion(request: Request) -> Response:
    """A chat completion as OpenAI's, and a job as any other: `x-job-id` names it, `/v1/jobs` knows it."""
    body = await read_model(request, ChatCompletionBody, HINT_TREE)
    view = services_of(request).views.get(body.model)
    generation = await off_loop(request, to_generation_request, body, view)
    run = await start(request, generation, _asked(body))
    if not body.stream:
        return WholeAnswer(
            [run], lambda records: from_result(records[0], generation, view.output_format, body.service_tier)
        )
    has_usage = bool(body.stream_options and body.stream_options.include_usage)
    stream = ChatStream(run, generation, view.output_format, has_usage=has_usage, service_tier=body.service_tier)
    return stream_answer(run, stream)


def _asked(body: ChatCompletionBody) -> Asked:
    return Asked(
        endpoint=Endpoint.CHAT,
        has_stream=bool(body.stream),
        is_stored=bool(body.store),
        service_tier=body.service_tier,
        metadata=body.metadata,
        spelling=spelling_of(body),
    )
