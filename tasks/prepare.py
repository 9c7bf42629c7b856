"""Prepares requests for acceptance: checks limits, tokenizes, fills in defaults and compiles grammars.

Used for live requests and batch lines. Defaults are filled in here, so that later changes to them do not affect
accepted jobs. Prompts are tokenized off the event loop, with limits on length, time and the number that wait.
"""

import asyncio
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar
from uuid import UUID

from domain.errors import ContextLengthExceeded, InvalidRequest, ServerOverloaded, UnsupportedParameter
from domain.model_names import model_name
from domain.requests import (
    MAX_INPUT_TOKENS,
    MAX_NUMBERS,
    MAX_PROMPT_LOGPROBS,
    NO_BOUND,
    ChatMessage,
    EmbeddingRequest,
    GenerationRequest,
    JobRequest,
    SamplingParams,
)
from local.shared_threads import SharedThreads
from metrics import labelled, tokenize_seconds
from text.grammar_compiler import GrammarGate
from text.models import ModelView, ModelViews

DEFAULT_MAX_TOKENS = 4_096  # if neither request nor model sets one; less if the context ends sooner


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A complete request, with its prompt as tokens."""

    request: JobRequest
    prompt_token_ids: list[int]
    input_lengths: list[int] | None  # of an embedding: tokens per input
    max_tokens: int
    seed: int


def refuse_ungenerable(view: ModelView) -> None:
    """Raises UnsupportedParameter for a model that cannot generate text."""
    if view.spec.task != "generation":
        raise UnsupportedParameter(
            f"{view.spec.id} does not generate text, as its task is {view.spec.task!r}; send inputs, or choose a model "
            "that generates text",
            param="model",
        )


def prepare_generation(request: GenerationRequest, view: ModelView, prompt_token_ids: list[int]) -> PreparedRequest:
    """Raises InvalidRequest if a limit is exceeded. Does not check the grammar."""
    resolved = resolve_params(request, view, len(prompt_token_ids))
    assert resolved.max_tokens is not None
    assert resolved.seed is not None
    whole = request.model_copy(update={"model": model_name(view.spec.id, request.adapter), "params": resolved})
    return PreparedRequest(whole, prompt_token_ids, None, resolved.max_tokens, resolved.seed)


def prepare_embedding(request: EmbeddingRequest, view: ModelView, inputs: list[list[int]]) -> PreparedRequest:
    whole = request.model_copy(update={"model": view.spec.id})
    token_ids = [token_id for ids in inputs for token_id in ids]
    return PreparedRequest(whole, token_ids, [len(ids) for ids in inputs], max_tokens=0, seed=0)


def resolve_params(request: GenerationRequest, view: ModelView, num_prompt_tokens: int) -> SamplingParams:
    """The parameters with every default filled in. Raises InvalidRequest if a limit is exceeded."""
    params = request.params
    _refuse_lacking(params, view)
    _refuse_endless_structure(params)
    _refuse_unknown_tokens(params, view)
    _refuse_too_many_sequences(params, view)
    _refuse_too_many_logprobs(params, num_prompt_tokens)
    max_tokens = _resolve_max_tokens(request, view, num_prompt_tokens)
    if params.min_tokens > max_tokens:
        raise InvalidRequest(
            f"params.min_tokens is {params.min_tokens} but max_tokens is {max_tokens}; lower it",
            param="params.min_tokens",
        )
    defaults, given = view.defaults, params.model_fields_set
    top_p = defaults.top_p if params.top_p is None else params.top_p
    temperature = defaults.temperature if params.temperature is None else params.temperature
    return params.model_copy(
        update={
            "max_tokens": max_tokens,
            # A top_p of 0 leaves only the most likely token, which is greedy decoding.
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
    context = f"{view.spec.id} has a context of {view.max_model_len} tokens for prompt and output together"
    if num_prompt_tokens == 0:
        raise InvalidRequest(f"{source} has no tokens; send some text", param=source)
    if room < (0 if asked == 0 else 1):
        raise ContextLengthExceeded(
            f"{source} has {num_prompt_tokens} tokens but {context}; shorten it by at least {1 - room} tokens",
            param=source,
        )
    if asked is not None and asked > room:
        raise ContextLengthExceeded(
            f"{source} has {num_prompt_tokens} tokens and max_tokens is {asked}, but {context}; "
            f"lower max_tokens to {room} or shorten the prompt",
            param="params.max_tokens",
        )
    return asked if asked is not None else min(room, view.defaults.max_new_tokens or DEFAULT_MAX_TOKENS)


def _refuse_lacking(params: SamplingParams, view: ModelView) -> None:
    """Raises UnsupportedParameter for a parameter that the model's engine does not have."""
    for name in sorted(view.spec.lacking_params):
        value = getattr(params, name)
        if value not in (None, SamplingParams.model_fields[name].get_default(call_default_factory=True)):
            shown = f" {value!r}" if isinstance(value, (int, float)) else ""
            raise UnsupportedParameter(
                f"params.{name} is{shown or ' set'}, but the engine of {view.spec.id}, backend {view.spec.backend!r}, "
                "does not have it; leave it out",
                param=f"params.{name}",
            )
    output, remote = params.structured_output, view.spec.remote
    if (
        view.spec.passes_messages
        and output is not None
        and remote is not None
        and output.kind not in remote.output_kinds
    ):
        raise UnsupportedParameter(
            f"params.structured_output.{output.kind} is set, but the server behind {view.spec.id}, backend "
            f"{view.spec.backend!r}, is not known to take it; leave it out, or set structured_output in its entry of "
            "models.toml",
            param=f"params.structured_output.{output.kind}",
        )


def _refuse_endless_structure(params: SamplingParams) -> None:
    if params.structured_output is not None and params.ignore_eos:
        raise InvalidRequest(
            "params.ignore_eos is true, but structured output ends where its grammar does; leave out one of the two",
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
            f"params.prompt_logprobs is {params.prompt_logprobs}, which makes {num_logprobs} logprobs for "
            f"{num_prompt_tokens} prompt tokens, more than {MAX_PROMPT_LOGPROBS}; request fewer alternatives, or "
            "shorten the prompt",
            param="params.prompt_logprobs",
        )


def _refuse_unknown_tokens(params: SamplingParams, view: ModelView) -> None:
    for name in ("logit_bias", "stop_token_ids", "bad_token_ids", "allowed_token_ids"):
        ids: Iterable[int] = getattr(params, name) or ()
        highest = max(ids, default=0)
        if highest >= view.vocab_size:
            raise InvalidRequest(
                f"params.{name} has token {highest} but {view.spec.id} has ids 0 to {view.vocab_size - 1}; remove it",
                param=f"params.{name}",
            )
    if params.allowed_token_ids and set(params.allowed_token_ids) <= set(params.bad_token_ids):
        raise InvalidRequest(
            "params.bad_token_ids has every token of allowed_token_ids, so there is nothing to draw; leave some out",
            param="params.bad_token_ids",
        )
    if len(set(params.bad_token_ids)) == view.vocab_size:
        raise InvalidRequest(
            f"params.bad_token_ids has all {view.vocab_size} tokens of {view.spec.id}; leave some out",
            param="params.bad_token_ids",
        )


def refuse_unembeddable(request: EmbeddingRequest, view: ModelView) -> None:
    """Checks that need no tokenizing. Raises UnsupportedParameter or InvalidRequest."""
    if request.queries is not None:
        _refuse_unscorable(request, view)
    elif view.spec.can_score:
        raise UnsupportedParameter(
            f"{view.spec.id} scores pairs of texts and has no vectors; send them to /v1/rerank or /v1/score, or add "
            "queries",
            param="model",
        )
    elif not view.spec.can_embed:
        raise UnsupportedParameter(
            f"{view.spec.id} cannot make embeddings, as its back end {view.spec.backend!r} does not expose hidden "
            "states; choose another model",
            param="model",
        )
    if request.adapter is not None:
        raise UnsupportedParameter(
            f"adapter {request.adapter!r} does not make embeddings; use model {view.spec.id!r}", param="model"
        )
    width = view.embedding_width
    if request.dimensions is not None and request.dimensions > width:
        raise InvalidRequest(
            f"dimensions is {request.dimensions} but the vectors of {view.spec.id} have {width}; lower it",
            param="dimensions",
        )
    num_numbers = len(request.inputs) * (request.dimensions or width)
    if num_numbers > MAX_NUMBERS:
        raise InvalidRequest(
            f"the vectors of inputs have {num_numbers} numbers, more than the {MAX_NUMBERS} of one job; send fewer",
            param="inputs",
        )


def _refuse_unscorable(request: EmbeddingRequest, view: ModelView) -> None:
    if not view.spec.can_score:
        raise UnsupportedParameter(
            f"queries are set, but {view.spec.id} does not score pairs, as its task is {view.spec.task!r}; leave them "
            "out, or choose a model whose task is 'scoring'",
            param="queries",
        )
    for place, value in enumerate(request.inputs):
        if not isinstance(value, str):
            raise InvalidRequest(
                f"inputs.{place} is a list of token ids, but with queries it must be text; send text",
                param=f"inputs.{place}",
            )


def encode_inputs(request: EmbeddingRequest, view: ModelView) -> list[list[int]]:
    """The token ids of each input, with its query if there is one. Raises InvalidRequest or ContextLengthExceeded."""
    max_tokens = _max_input_tokens(request, view)
    if request.queries is None:
        inputs = [view.encode_input(value, place, max_tokens) for place, value in enumerate(request.inputs)]
    else:
        queries = request.queries * (len(request.inputs) if len(request.queries) == 1 else 1)
        pairs = zip(queries, request.inputs, strict=True)
        inputs = [view.encode_pair(query, str(value), place, max_tokens) for place, (query, value) in enumerate(pairs)]
    _check_lengths([len(ids) for ids in inputs], view)
    return inputs


def _max_input_tokens(request: EmbeddingRequest, view: ModelView) -> int | None:
    """Where inputs are cut; None if they are not. Raises InvalidRequest."""
    asked = request.truncate_prompt_tokens
    if asked == NO_BOUND:
        return view.max_model_len
    if asked is not None and asked > view.max_model_len:
        raise InvalidRequest(
            f"truncate_prompt_tokens is {asked} but {view.spec.id} takes at most {view.max_model_len} tokens; "
            "lower it, or send -1",
            param="truncate_prompt_tokens",
        )
    return asked


def _check_lengths(lengths: Sequence[int], view: ModelView) -> None:
    for place, length in enumerate(lengths):
        if not length:
            raise InvalidRequest(f"inputs.{place} has no tokens; send some text", param=f"inputs.{place}")
        if length > view.max_model_len:
            raise ContextLengthExceeded(
                f"inputs.{place} has {length} tokens but {view.spec.id} takes at most {view.max_model_len}; shorten it",
                param=f"inputs.{place}",
            )
    if sum(lengths) > MAX_INPUT_TOKENS:
        raise InvalidRequest(
            f"inputs have {sum(lengths)} tokens in all, more than the {MAX_INPUT_TOKENS} of one job; send fewer",
            param="inputs",
        )


# Ordinary text has three to five characters per token. A prompt beyond this cannot fit into the context, so it is
# refused without tokenizing; any other takes well under a second.
MAX_CHARS_PER_TOKEN = 16

INLINE_CHARS = 2_000  # a third of a millisecond: less than two thread switches cost under load

NUM_THREADS = 2

MAX_WAITING = 256  # long prompts; tenants take turns

TIMEOUT_SECONDS = 10.0  # for one prompt, waiting included

Ids = TypeVar("Ids")


class TokenizingPool:
    """Tokenizes short prompts on the event loop and long ones in a few threads (the tokenizer releases the GIL)."""

    def __init__(self) -> None:
        self._threads = SharedThreads(
            NUM_THREADS, max_waiting=MAX_WAITING, name="tokenizer", what="long prompts are waiting to be tokenized"
        )

    async def encode(self, view: ModelView, request: GenerationRequest) -> list[int]:
        """Raises ContextLengthExceeded, InvalidRequest (the chat template refuses) or ServerOverloaded."""
        num_chars = num_prompt_chars(request)
        refuse_endless_prompt(view, request, num_chars)
        return await self._run(view, num_chars, lambda: view.encode(request))

    async def encode_text(self, view: ModelView, text: str) -> list[int]:
        """Without the special tokens around a prompt. Raises InvalidRequest or ServerOverloaded."""
        return await self._run(view, len(text), lambda: view.encode_text(text))

    async def encode_inputs(self, view: ModelView, request: EmbeddingRequest) -> list[list[int]]:
        """Raises ContextLengthExceeded, InvalidRequest or ServerOverloaded."""
        return await self._run(view, request.num_chars, lambda: encode_inputs(request, view))

    async def _run(self, view: ModelView, num_chars: int, encode: Callable[[], Ids]) -> Ids:
        started = time.perf_counter()
        ids = encode() if num_chars <= INLINE_CHARS else await self._encode_in_thread(encode)
        labelled(tokenize_seconds, view.spec.id).observe(time.perf_counter() - started)
        return ids

    async def _encode_in_thread(self, encode: Callable[[], Ids]) -> Ids:
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                return await self._threads.run(encode)
        except TimeoutError:
            raise ServerOverloaded(
                f"the prompt was not tokenized within {TIMEOUT_SECONDS:.0f} s; retry, or shorten it"
            ) from None

    def close(self) -> None:
        self._threads.close()


def num_prompt_chars(request: GenerationRequest) -> int:
    if request.messages is not None:
        tools = sum(len(tool.model_dump_json()) for tool in request.tools)
        return tools + sum(_num_message_chars(message) for message in request.messages)
    return len(request.prompt or "")


def _num_message_chars(message: ChatMessage) -> int:
    calls = sum(len(call.arguments) for call in message.tool_calls)
    return len(message.content) + len(message.reasoning_content or "") + calls


def refuse_endless_prompt(view: ModelView, request: GenerationRequest, num_chars: int) -> None:
    bound = view.max_model_len * MAX_CHARS_PER_TOKEN
    if num_chars > bound:
        raise ContextLengthExceeded(
            f"the prompt has {num_chars} characters but {view.spec.id} has a context of {view.max_model_len} tokens; "
            f"shorten it to far less than {bound} characters",
            param=request.source,
        )


class RequestPreparer:
    """Prepares requests. Bound to one event loop; owns the tokenizing threads and the grammar compilers."""

    def __init__(self, views: ModelViews) -> None:
        self._views = views
        self._tokenizing = TokenizingPool()
        self._grammar_gate = GrammarGate()

    def prepare_grammars(self) -> None:
        """Start the models' grammar compilers in the background. Call it again when the models change."""
        self._grammar_gate.prepare(self._views.loaded())

    async def prepare(
        self, request: JobRequest, tenant_id: UUID, view: ModelView, known_ids: list[int] | None = None
    ) -> PreparedRequest:
        """`view` is that of its model, and `known_ids` are those of its prompt, if they are known. Raises the
        CeleriacError that says why the request cannot become a job."""
        refuse_unfit(request, view)
        if isinstance(request, EmbeddingRequest):
            return prepare_embedding(request, view, await self._tokenizing.encode_inputs(view, request))
        token_ids = await self._tokenizing.encode(view, request) if known_ids is None else known_ids
        prepared = prepare_generation(request, view, token_ids)
        if request.params.structured_output is not None and not view.spec.passes_messages:
            await self._grammar_gate.check(view, request.params.structured_output, tenant_id)
        return prepared

    async def encode_prompt(self, request: GenerationRequest) -> list[int]:
        """The tokens of a prompt, without submitting it. Raises the CeleriacError that says why it is invalid."""
        return await self._tokenizing.encode(self._views.get(request.model), request)

    async def encode_text(self, model: str, text: str) -> list[int]:
        """The tokens of a text alone. Raises the CeleriacError that says why there are none."""
        return await self._tokenizing.encode_text(self._views.get(model), text)

    async def aclose(self) -> None:
        self._tokenizing.close()
        await self._grammar_gate.aclose()


def refuse_unfit(request: JobRequest, view: ModelView) -> None:
    """Checks that need no tokenizing. Raises UnsupportedParameter or InvalidRequest."""
    if isinstance(request, EmbeddingRequest):
        refuse_unembeddable(request, view)
    else:
        refuse_ungenerable(view)
