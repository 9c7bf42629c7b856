"""Checks a request's bounds and fills in its defaults, so that a default that changes later changes no accepted job."""

import secrets
from collections.abc import Iterable
from dataclasses import dataclass

from domain.embeddings import EmbeddingRequest
from domain.errors import ContextLengthExceeded, InvalidRequest, UnsupportedParameter
from domain.kinds import JobRequest
from domain.requests import MAX_PROMPT_LOGPROBS, GenerationRequest, SamplingParams
from tasks.models import ModelView

DEFAULT_MAX_TOKENS = 4_096  # where neither the request nor the model names a number; less where the context ends sooner


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A request with nothing left open, counted in tokens."""

    request: JobRequest
    prompt_token_ids: list[int]
    input_lengths: list[int] | None  # of an embedding: tokens of each input
    max_tokens: int
    seed: int


def refuse_ungenerable(view: ModelView) -> None:
    if view.spec.task == "embedding":
        raise UnsupportedParameter(
            f"{view.spec.id} makes embeddings and generates no text; send inputs, or choose another model",
            param="model",
        )


def prepare_generation(request: GenerationRequest, view: ModelView, prompt_token_ids: list[int]) -> PreparedRequest:
    """Raises where a bound is broken; whether its grammar, if it has one, can be followed is still to be asked."""
    resolved = resolve_params(request, view, len(prompt_token_ids))
    assert resolved.max_tokens is not None
    assert resolved.seed is not None
    whole = GenerationRequest.model_construct(
        model=view.spec.id,
        prompt=request.prompt,
        messages=request.messages,
        prompt_token_ids=request.prompt_token_ids,
        tools=request.tools,
        parallel_tool_calls=request.parallel_tool_calls,
        params=resolved,
    )
    return PreparedRequest(whole, prompt_token_ids, None, resolved.max_tokens, resolved.seed)


def prepare_embedding(request: EmbeddingRequest, view: ModelView, inputs: list[list[int]]) -> PreparedRequest:
    whole = request.model_copy(update={"model": view.spec.id})
    token_ids = [token_id for ids in inputs for token_id in ids]
    return PreparedRequest(whole, token_ids, [len(ids) for ids in inputs], max_tokens=0, seed=0)


def resolve_params(request: GenerationRequest, view: ModelView, num_prompt_tokens: int) -> SamplingParams:
    """Every default filled in, so that a changed one never changes an accepted job. Raises where a bound is broken."""
    params = request.params
    _refuse_endless_structure(params)
    _refuse_unknown_tokens(params, view)
    _refuse_too_many_sequences(params, view)
    _refuse_too_many_logprobs(params, num_prompt_tokens)
    max_tokens = _resolve_max_tokens(request, view, num_prompt_tokens)
    if params.min_tokens > max_tokens:
        raise InvalidRequest(
            f"params.min_tokens is {params.min_tokens} but only {max_tokens} tokens may come; lower it",
            param="params.min_tokens",
        )
    defaults, given = view.defaults, params.model_fields_set
    top_p = defaults.top_p if params.top_p is None else params.top_p
    temperature = defaults.temperature if params.temperature is None else params.temperature
    return params.model_copy(
        update={
            "max_tokens": max_tokens,
            # A share of 0 leaves the most likely token, which is what greedy means.
            "temperature": temperature if top_p else 0.0,
            "top_p": top_p or 1.0,
            "top_k": defaults.top_k if params.top_k is None else params.top_k,
            "min_p": params.min_p if "min_p" in given else defaults.min_p,
            "repetition_penalty": (
                params.repetition_penalty if "repetition_penalty" in given else defaults.repetition_penalty
            ),
            "seed": secrets.randbits(63) if params.seed is None else params.seed,
        }
    )


def _resolve_max_tokens(request: GenerationRequest, view: ModelView, num_prompt_tokens: int) -> int:
    source = request.source
    asked = request.params.max_tokens
    room = view.max_model_len - num_prompt_tokens
    holds = f"{view.spec.id} holds {view.max_model_len} tokens, prompt and output together"
    if num_prompt_tokens == 0:
        raise InvalidRequest(f"{source} comes to no token at all; send some text", param=source)
    if room < (0 if asked == 0 else 1):
        raise ContextLengthExceeded(
            f"{source} comes to {num_prompt_tokens} tokens but {holds}; shorten it by at least {1 - room} tokens",
            param=source,
        )
    if asked is not None and asked > room:
        raise ContextLengthExceeded(
            f"{source} comes to {num_prompt_tokens} tokens and max_tokens is {asked}, but {holds}; "
            f"lower max_tokens to {room} or shorten the prompt",
            param="params.max_tokens",
        )
    return asked if asked is not None else min(room, view.defaults.max_new_tokens or DEFAULT_MAX_TOKENS)


def _refuse_endless_structure(params: SamplingParams) -> None:
    if params.structured_output is not None and params.ignore_eos:
        raise InvalidRequest(
            "params.ignore_eos is true, but a structured output ends where its grammar says; leave one of them out",
            param="params.ignore_eos",
        )


def _refuse_too_many_sequences(params: SamplingParams, view: ModelView) -> None:
    if params.num_sequences > view.spec.max_num_seqs:
        name = "params.n" if params.best_of is None else "params.best_of"
        raise InvalidRequest(
            f"{name} is {params.num_sequences} but {view.spec.id} runs {view.spec.max_num_seqs} sequences at once; "
            "lower it",
            param=name,
        )


def _refuse_too_many_logprobs(params: SamplingParams, num_prompt_tokens: int) -> None:
    if params.prompt_logprobs is None:
        return
    num_logprobs = num_prompt_tokens * (1 + params.prompt_logprobs)
    if num_logprobs > MAX_PROMPT_LOGPROBS:
        raise InvalidRequest(
            f"params.prompt_logprobs comes to {num_logprobs} logprobs for {num_prompt_tokens} prompt tokens, more than "
            f"{MAX_PROMPT_LOGPROBS}; ask for fewer alternatives, or shorten the prompt",
            param="params.prompt_logprobs",
        )


def _refuse_unknown_tokens(params: SamplingParams, view: ModelView) -> None:
    for name in ("logit_bias", "stop_token_ids", "bad_token_ids"):
        ids: Iterable[int] = getattr(params, name)
        highest = max(ids, default=0)
        if highest >= view.vocab_size:
            raise InvalidRequest(
                f"params.{name} names token {highest} but {view.spec.id} has ids 0 to {view.vocab_size - 1}; remove it",
                param=f"params.{name}",
            )
    if len(set(params.bad_token_ids)) == view.vocab_size:
        raise InvalidRequest(
            f"params.bad_token_ids names all {view.vocab_size} tokens of {view.spec.id}; leave some to be drawn",
            param="params.bad_token_ids",
        )
