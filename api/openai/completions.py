"""POST /v1/completions, the older way: prompts as text or token ids, one job for each of them."""

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import Request
from pydantic import Discriminator, Field, Tag
from starlette.responses import Response

from api.bodies import off_loop, read_model
from api.deps import private_router, services_of
from api.openai.answers import WholeAnswer
from api.openai.completion_output import CompletionStream, Prompt, from_results, usage_chunk
from api.openai.hints import HINT_TREE
from api.openai.running import Asked, start_all
from api.openai.schemas import (
    GenerationBody,
    StreamOptions,
    Strings,
    Unsupported,
    build,
    refuse_idle_stream_options,
    strings,
)
from api.openai.streaming import stream_answers
from api.openai.views import CompletionView
from api.openapi import request_body, streamed_or
from domain.errors import InvalidRequest, UnsupportedParameter
from domain.jobs import Endpoint
from domain.requests import MAX_PROMPT_TOKENS, GenerationRequest
from tasks.models import ModelView

MAX_PROMPTS = 128
DEFAULT_MAX_TOKENS = 16  # this route's, since its beginning

router = private_router()


def _kind_of(prompt: object) -> str:
    if isinstance(prompt, str):
        return "<text>"
    first = prompt[0] if isinstance(prompt, list) and prompt else ""
    return "<texts>" if isinstance(first, str) else "<token_lists>" if isinstance(first, list) else "<tokens>"


Texts = Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
TokenList = Annotated[list[int], Field(max_length=MAX_PROMPT_TOKENS)]
TokenLists = Annotated[list[TokenList], Field(min_length=1, max_length=MAX_PROMPTS)]
CompletionPrompts = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[Texts, Tag("<texts>")]
    | Annotated[TokenList, Tag("<tokens>")]
    | Annotated[TokenLists, Tag("<token_lists>")],
    Discriminator(_kind_of),
]


class CompletionBody(GenerationBody):
    prompt: CompletionPrompts
    max_tokens: int | None = None
    n: int | None = None
    best_of: int | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    stop: Strings | None = None
    stream_options: StreamOptions | None = None
    suffix: Unsupported = None


@router.post(
    "/v1/completions",
    responses=streamed_or(CompletionView),
    openapi_extra=request_body(CompletionBody),
)
async def create_completion(request: Request) -> Response:
    """Choices are numbered prompt by prompt: choice `i * n + j` is answer `j` to prompt `i`."""
    body = await read_model(request, CompletionBody, HINT_TREE)
    view = services_of(request).views.get(body.model)
    generations = await off_loop(request, to_generation_requests, body)
    runs = await start_all(request, generations, _asked(body))
    prompts = await off_loop(request, _prompts_of, body, generations, view)
    if not body.stream:
        return WholeAnswer(runs, lambda records: from_results(records, prompts, body.service_tier))
    has_usage = bool(body.stream_options and body.stream_options.include_usage)
    streams = [
        CompletionStream(runs[0], prompt, has_usage=has_usage, service_tier=body.service_tier) for prompt in prompts
    ]
    return stream_answers(runs, streams, lambda records: usage_chunk(records, body.service_tier) if has_usage else ())


def to_generation_requests(body: CompletionBody) -> list[GenerationRequest]:
    """One per prompt. Raises InvalidRequest."""
    refuse_idle_stream_options(body)
    if body.stream and body.best_of is not None and body.best_of > 1:
        raise UnsupportedParameter("best_of cannot be streamed: the best is known at the end", param="best_of")
    if body.max_tokens == 0 and not body.echo:
        raise InvalidRequest("max_tokens is 0 and echo is not set, which leaves nothing to answer", param="max_tokens")
    params = body.sampling(
        max_tokens=DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens,
        stop=strings(body.stop),
        best_of=None if body.best_of == (body.n or 1) else body.best_of,
        prompt_logprobs=_num_prompt_logprobs(body),
    )
    return [build(GenerationRequest, {"model": body.model, "params": params} | prompt) for prompt in _prompts(body)]


def _prompts(body: CompletionBody) -> list[dict[str, Any]]:
    prompt: Any = body.prompt
    kind = _kind_of(prompt)
    if kind in ("<text>", "<texts>"):
        return [{"prompt": text} for text in strings(prompt) or ()]
    return [{"prompt_token_ids": ids} for ids in (prompt if kind == "<token_lists>" else [prompt])]


def _num_prompt_logprobs(body: CompletionBody) -> int | None:
    """A prompt that is only echoed is scored all the same: that is what a job without output does."""
    if not body.echo:
        return None
    return body.logprobs if body.logprobs is not None else 0 if body.max_tokens == 0 else None


def _prompts_of(body: CompletionBody, generations: Sequence[GenerationRequest], view: ModelView) -> list[Prompt]:
    return [prompt_of(body, generation, view, number) for number, generation in enumerate(generations)]


def prompt_of(body: CompletionBody, generation: GenerationRequest, view: ModelView, number: int) -> Prompt:
    n = generation.params.n
    if not body.echo:
        return Prompt(first_index=number * n, num_choices=n, logprobs=body.logprobs)
    token_ids = view.encode(generation)
    is_text = generation.prompt is not None
    return Prompt(
        first_index=number * n,
        num_choices=n,
        logprobs=body.logprobs,
        text=generation.prompt if generation.prompt is not None else view.decode(token_ids),
        pieces=() if body.logprobs is None else tuple(view.pieces(token_ids, skip_special_tokens=is_text)),
        is_alone=body.max_tokens == 0,
    )


def _asked(body: CompletionBody) -> Asked:
    return Asked(
        endpoint=Endpoint.COMPLETIONS,
        has_stream=bool(body.stream),
        service_tier=body.service_tier,
        metadata=body.metadata,
    )
