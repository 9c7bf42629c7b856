"""/generate, /generate_stream, /chat and /api/v1/infer: minimal routes that take and return text.

`request_id` in an answer is the id of the job.
"""

import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import Field, StringConstraints
from starlette.requests import Request
from starlette.responses import Response

from api.errors import json_response
from api.inputs import read_body, read_for_model, read_generation, require_json
from api.openai.answers import Framing, WholeAnswer, stream_answer
from api.openai.running import Asked, answer_headers, start, start_all
from api.openapi import EVENTS, request_body
from api.services import Services, caller_of, private_router
from dialects.aliases import MAX_TOKENS, SAMPLING
from dialects.openai import SamplingBody, Strings, build, spelling_of_params, strings
from dialects.openai_views import View
from domain.errors import InvalidRequest, JobUnreadable, ServerOverloaded, TooManyQueuedJobs
from domain.job_options import JobOptions
from domain.jobs import Endpoint, external_id
from domain.requests import GenerationRequest, GenerationResult, TokenChunk
from storage import job_queries
from storage.job_queries import JobRecord
from tasks.prepare import resolve_params
from tasks.submit import request_hash
from text.models import ModelView

MAX_PROMPTS = 64
CHAT_MAX_TOKENS = 100  # the default of /chat

router = private_router("Simple")

Prompts = Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]


class SimpleBody(SamplingBody):
    """The parameters that every simple route takes. Those left out have the model's defaults."""

    ALIASES = SAMPLING | MAX_TOKENS

    model: Annotated[str, StringConstraints(min_length=1, max_length=256)]
    max_tokens: int | None = None
    stop: Strings | None = None

    def to_request(self, source: Mapping[str, Any], **params: Any) -> GenerationRequest:
        """`source` is {"prompt": ...} or {"messages": ...}; `params` override fields of the body. Raises
        InvalidRequest."""
        sampling = self.sampling(**{"stop": strings(self.stop)} | params)
        return build(GenerationRequest, {"model": self.model, "params": sampling} | dict(source))


class GenerateBody(SimpleBody):
    prompt: str | None = None
    prompts: Prompts | None = None
    inputs: str | None = None  # an alias of prompt

    def to_requests(self) -> list[GenerationRequest]:
        """Raises InvalidRequest."""
        return [self.to_request({"prompt": text}) for text in self.texts()]

    def texts(self) -> list[str]:
        """Raises InvalidRequest unless exactly one of the three is given."""
        given = [name for name in ("prompt", "prompts", "inputs") if getattr(self, name) is not None]
        if len(given) != 1:
            seen = " and ".join(given) or "none"
            raise InvalidRequest(f"{seen} of prompt, prompts and inputs was sent; send exactly one", param="prompt")
        return strings(getattr(self, given[0])) or []


class GenerateStreamBody(SimpleBody):
    prompt: str | None = None
    inputs: str | None = None

    def text(self) -> str:
        """Raises InvalidRequest unless exactly one of the two is given."""
        if self.prompt is not None and self.inputs is not None:
            raise InvalidRequest("prompt and inputs mean the same; send only one of them", param="inputs")
        text = self.inputs if self.prompt is None else self.prompt
        if text is None:
            raise InvalidRequest("prompt is missing; add it", param="prompt")
        return text


class InferBody(SimpleBody):
    prompt: str
    use_cache: bool = True

    def to_generation(self, view: ModelView) -> GenerationRequest:
        """Raises InvalidRequest."""
        return self.to_request({"prompt": self.prompt})


class ChatBody(SimpleBody):
    prompt: str


class TextView(View):
    text: str


class AnsweredView(TextView):
    """The fields that /generate and /api/v1/infer have in common."""

    request_id: Annotated[str, Field(description="The job's id.")]
    tokens_generated: int
    latency_ms: Annotated[float, Field(description="From acceptance to completion, time in the queue included.")]


class GeneratedView(AnsweredView):
    finish_reason: Literal["stop", "length"]


class GeneratedListView(View):
    results: list[GeneratedView]


class InferredView(AnsweredView):
    cached: Annotated[bool, Field(description="Whether the answer is that of an earlier job.")]


@router.post(
    "/generate",
    responses={200: {"model": GeneratedView | GeneratedListView}},
    openapi_extra=request_body(GenerateBody),
)
async def generate(request: Request) -> Response:
    """Continue one prompt, or up to 64 of them: each is a job, and they run at the same time."""
    require_json(request)
    read = await read_generation(request, await read_body(request), GenerateBody, lambda body, _: body.to_requests())
    body, generations = read.body, read.generation
    spelling = spelling_of_params() if body.prompts is None else spelling_of_params(prompt="prompts")
    asked = Asked(
        Endpoint.SIMPLE, has_stream=False, use_cache=body.use_cache, spelling=spelling, timeouts=body.timeouts
    )
    runs = await start_all(request, generations, asked)
    if all(run.record is not None for run in runs):
        runs[0].services.known_bodies.note(read)
    if body.prompts is None:
        return WholeAnswer(runs, lambda records: generated(records[0]))
    return WholeAnswer(runs, lambda records: {"results": [generated(record) for record in records]})


@router.post(
    "/generate_stream",
    response_class=Response,
    responses={200: EVENTS},
    openapi_extra=request_body(GenerateStreamBody),
)
async def generate_stream(request: Request) -> Response:
    """Continue one prompt and stream the text; the last event has `done`."""
    body = await read_for_model(request, GenerateStreamBody)
    generation = body.to_request({"prompt": body.text()})
    asked = Asked(Endpoint.SIMPLE, has_stream=True, use_cache=body.use_cache, timeouts=body.timeouts)
    run = await start(request, generation, asked)
    return stream_answer(run, GeneratedStream(), Framing(last_frame=b""))


@router.post("/chat", responses={200: {"model": TextView}}, openapi_extra=request_body(ChatBody))
async def chat(request: Request) -> Response:
    """Answer a prompt as a chat message, with the model's system prompt if models.toml has one."""
    body = await read_for_model(request, ChatBody)
    source = {"messages": [{"role": "user", "content": body.prompt}]}
    max_tokens = CHAT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    generation = body.to_request(source, max_tokens=max_tokens)
    asked = Asked(Endpoint.SIMPLE, has_stream=False, use_cache=body.use_cache, timeouts=body.timeouts)
    run = await start(request, generation, asked)
    return WholeAnswer([run], lambda records: {"text": _text_of(records[0])})


@router.post("/api/v1/infer", responses={200: {"model": InferredView}}, openapi_extra=request_body(InferBody))
async def infer(request: Request) -> Response:
    """Continue a prompt within CELERIAC_REQUEST_TIMEOUT_SECONDS. A deterministic request may get the answer of an
    earlier job."""
    started = time.monotonic()
    services, tenant_id = caller_of(request)
    require_json(request)
    read = await read_generation(request, await read_body(request), InferBody, InferBody.to_generation)
    body, generation = read.body, read.generation
    if (
        services.settings.response_cache in ("off", "asked")
        and body.use_cache
        and (known := await find_answered(services, tenant_id, generation)) is not None
    ):
        return _answer_known(known, started)
    timeout_seconds = services.settings.request_timeout_seconds
    try:
        run = await start(
            request,
            generation,
            Asked(
                Endpoint.SIMPLE,
                has_stream=False,
                timeout_seconds=timeout_seconds,
                use_cache=body.use_cache if "use_cache" in body.model_fields_set else None,
                timeouts=body.timeouts,
            ),
        )
    except TooManyQueuedJobs as exc:
        raise ServerOverloaded(exc.message, retry_after_seconds=exc.retry_after_seconds) from exc
    if run.record is not None:
        services.known_bodies.note(read)
    else:
        run = replace(run, has_keep_alive=False)  # keep-alive would commit to a 200 before a timeout is known
    return WholeAnswer([run], lambda records: inferred(records[0]), timeout_seconds=timeout_seconds)


async def find_answered(services: Services, tenant_id: UUID, generation: GenerationRequest) -> JobRecord | None:
    """The tenant's newest completed job whose output this request would reproduce: same model revision, same prompt,
    same parameters once defaults are filled in, and no randomness. None if there is none."""
    view = services.views.get(generation.model)
    key = request_hash(generation, JobOptions(endpoint=Endpoint.SIMPLE))
    try:
        record = await services.read(job_queries.find_completed, tenant_id, key, model_revision=view.revision)
    except JobUnreadable:  # it cannot be read, so it answers nobody
        return None
    if record is None or not isinstance(record.request, GenerationRequest):
        return None
    stored = record.request.params
    # Same prompt and revision, so the token count of that job applies.
    resolved = resolve_params(generation, view, record.job.num_prompt_tokens)
    if generation.params.seed is None and resolved.temperature != 0:
        return None
    is_same = resolved.model_copy(update={"seed": stored.seed}) == stored
    return record if is_same and generation.params.seed in (None, stored.seed) else None


def _answer_known(record: JobRecord, started: float) -> Response:
    answer = inferred(record) | {"latency_ms": _milliseconds(time.monotonic() - started), "cached": True}
    headers = answer_headers(started) | {"x-job-id": external_id(record.job.id)}
    return json_response(answer, headers=headers)


class GeneratedStream:
    """A job's stream as token events. `index` is the number of tokens before the event, which has one chunk's text."""

    def __init__(self) -> None:
        self._num_tokens = 0

    def begin(self) -> Iterable[Mapping[str, object]]:
        return ()

    def from_chunk(self, chunk: TokenChunk) -> Iterable[Mapping[str, object]]:
        index, self._num_tokens = self._num_tokens, self._num_tokens + len(chunk.token_ids)
        return ({"token": {"text": chunk.text}, "index": index},) if chunk.text else ()

    def finish(self, record: JobRecord) -> Iterable[Mapping[str, object]]:
        yield {
            "generated_text": _text_of(record),
            "finish_reason": _finish_reason(record),
            "tokens_generated": _num_tokens(record),
            "done": True,
        }


def generated(record: JobRecord) -> dict[str, object]:
    return {
        "text": _text_of(record),
        "request_id": external_id(record.job.id),
        "tokens_generated": _num_tokens(record),
        "latency_ms": _latency_ms(record),
        "finish_reason": _finish_reason(record),
    }


def inferred(record: JobRecord) -> dict[str, object]:
    return {
        "text": _text_of(record),
        "request_id": external_id(record.job.id),
        "latency_ms": _latency_ms(record),
        "tokens_generated": _num_tokens(record),
        "cached": record.job.answered_by is not None,
    }


def _text_of(record: JobRecord) -> str:
    assert isinstance(record.result, GenerationResult)
    return record.result.choices[0].text


def _num_tokens(record: JobRecord) -> int:
    assert isinstance(record.result, GenerationResult)
    return record.result.choices[0].num_tokens


def _finish_reason(record: JobRecord) -> str:
    assert isinstance(record.result, GenerationResult)
    return record.result.choices[0].finish_reason.value


def _latency_ms(record: JobRecord) -> float:
    """From acceptance to completion, time in the queue included, by the database's clock."""
    assert record.job.finished_at is not None
    return _milliseconds((record.job.finished_at - record.job.created_at).total_seconds())


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 1)
