"""What is asked for (GenerationRequest) and what comes back (GenerationResult). Both are stored as they stand here."""

import math
from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, StringConstraints, model_validator

from domain.chunks import TokenLogprob
from domain.jobs import FinishReason, Frozen, Usage
from domain.structured_output import StructuredOutput
from domain.tools import MAX_TOOLS, ToolCall, ToolDefinition

MAX_MESSAGES = 256
MAX_PROMPT_CHARS = 1_000_000
MAX_CHOICES = 8
MAX_STOP_STRINGS = 16
MAX_LOGIT_BIAS = 1024
MAX_BAD_TOKENS = 1024
MAX_PROMPT_TOKENS = 1_000_000
MAX_PROMPT_LOGPROBS = 65_536  # logprobs of one prompt, alternatives included: they travel in one chunk

NO_BOUND = -1  # as a max_tokens or a top_k: there is none, as other servers have it

Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
StopString = Annotated[str, StringConstraints(min_length=1, max_length=128)]


def _unbounded(max_tokens: int | None) -> int | None:
    return None if max_tokens == NO_BOUND else max_tokens


def _off(top_k: int | None) -> int | None:
    return 0 if top_k == NO_BOUND else top_k


class ChatMessage(Frozen):
    role: Literal["system", "user", "assistant", "tool"]
    content: str = Field(max_length=MAX_PROMPT_CHARS)
    name: str | None = Field(default=None, max_length=64)
    reasoning_content: str | None = Field(default=None, max_length=MAX_PROMPT_CHARS)  # of an assistant
    tool_calls: tuple[ToolCall, ...] = Field(default=(), max_length=MAX_TOOLS)  # of an assistant
    tool_call_id: str | None = Field(default=None, max_length=128)  # which call a tool answers


class SamplingParams(Frozen):
    """How tokens are drawn. `None` means the model's own default (its generation config), resolved at submit."""

    max_tokens: Annotated[int | None, AfterValidator(_unbounded)] = Field(  # 0 only scores: see prompt_logprobs
        default=None, ge=NO_BOUND, le=1_000_000
    )
    min_tokens: int = Field(default=0, ge=0, le=1_000_000)
    temperature: Finite | None = Field(default=None, ge=0, le=2)  # 0 is greedy
    top_p: Finite | None = Field(default=None, ge=0, le=1)  # 0 is greedy, too
    top_k: Annotated[int | None, AfterValidator(_off)] = Field(default=None, ge=NO_BOUND, le=1_000_000)  # 0 is off
    min_p: Finite = Field(default=0.0, ge=0, le=1)
    seed: Seed | None = None  # drawn at accept where the client gives none
    stop: tuple[StopString, ...] = Field(default=(), max_length=MAX_STOP_STRINGS)
    stop_token_ids: tuple[TokenId, ...] = Field(default=(), max_length=64)
    bad_token_ids: tuple[TokenId, ...] = Field(default=(), max_length=MAX_BAD_TOKENS)  # never drawn
    ignore_eos: bool = False
    presence_penalty: Finite = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: Finite = Field(default=0.0, ge=-2, le=2)
    repetition_penalty: Finite = Field(default=1.0, gt=0, le=10)
    logit_bias: dict[TokenId, Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]] = Field(
        default_factory=dict, max_length=MAX_LOGIT_BIAS
    )
    logprobs: int | None = Field(default=None, ge=0, le=20)  # how many alternatives beside the drawn token
    prompt_logprobs: int | None = Field(default=None, ge=0, le=20)  # of each prompt token: how many alternatives
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    best_of: int | None = Field(default=None, ge=1, le=MAX_CHOICES)  # so many run; the n best by mean logprob are kept
    structured_output: StructuredOutput | None = None

    @property
    def num_sequences(self) -> int:
        """How many run at once: the candidates of best_of, else n."""
        return self.best_of or self.n

    @model_validator(mode="after")
    def _min_within_max(self) -> Self:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens is {self.min_tokens}, more than max_tokens {self.max_tokens}; lower it")
        return self

    @model_validator(mode="after")
    def _best_of_at_least_n(self) -> Self:
        if self.best_of is not None and self.best_of < self.n:
            raise ValueError(f"best_of is {self.best_of}, less than n {self.n}; raise it or leave it out")
        return self

    @model_validator(mode="after")
    def _scoring_or_some_output(self) -> Self:
        if self.max_tokens == 0 and self.prompt_logprobs is None:
            raise ValueError("max_tokens is 0, which only scores the prompt; ask for prompt_logprobs, or for a token")
        if self.max_tokens == 0 and self.num_sequences > 1:
            raise ValueError("max_tokens is 0: there is no output to choose from; leave n and best_of out")
        return self


class GenerationRequest(Frozen):
    """One generation: a plain prompt to continue, in text or token ids, or chat messages to answer."""

    kind: Literal["generation"] = "generation"
    model: str = Field(min_length=1, max_length=256)
    prompt: str | None = Field(default=None, min_length=1, max_length=MAX_PROMPT_CHARS)
    messages: tuple[ChatMessage, ...] | None = Field(default=None, min_length=1, max_length=MAX_MESSAGES)
    prompt_token_ids: tuple[TokenId, ...] | None = Field(default=None, min_length=1, max_length=MAX_PROMPT_TOKENS)
    tools: tuple[ToolDefinition, ...] = Field(default=(), max_length=MAX_TOOLS)  # shown by the chat template
    parallel_tool_calls: bool = True
    params: SamplingParams = SamplingParams()

    @model_validator(mode="after")
    def _tools_in_a_chat(self) -> Self:
        if self.tools and self.messages is None:
            raise ValueError("tools are shown by the chat template, so they need messages; leave them out")
        return self

    @model_validator(mode="after")
    def _one_input(self) -> Self:
        if sum(given is not None for given in (self.prompt, self.messages, self.prompt_token_ids)) != 1:
            raise ValueError("give prompt, messages or prompt_token_ids, exactly one of them")
        return self

    @property
    def source(self) -> str:
        """The field that gives the input."""
        fields = {"prompt": self.prompt, "messages": self.messages, "prompt_token_ids": self.prompt_token_ids}
        return next(name for name, value in fields.items() if value is not None)


class ResultChoice(Frozen):
    """One finished sequence. `text` is the concatenated text of its chunks.

    Under best_of the choices are the n best candidates, best first: `candidate` is the index that the stream's chunks
    of this one bear, `mean_logprob` what it was chosen by (None where it ended before its first token).

    `num_reasoning_tokens` are its tokens up to and including the one that completes the first </think>, whether or not
    that ends a reasoning: only who knows the model's format can tell. None where there is no </think>.
    """

    index: int
    text: str
    finish_reason: FinishReason
    num_tokens: int
    num_reasoning_tokens: int | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    candidate: int | None = None
    mean_logprob: float | None = None


class GenerationResult(Frozen):
    """What a finished job holds; partial for cancelled and expired jobs. `usage` counts every candidate's tokens."""

    choices: tuple[ResultChoice, ...]
    usage: Usage
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None  # one per prompt token; the first has none


def best_choices(candidates: Sequence[ResultChoice], num_choices: int) -> tuple[ResultChoice, ...]:
    """The candidates with the highest mean_logprob, best first, earlier ones before equals, and numbered anew."""
    ranked = sorted(candidates, key=_mean_logprob, reverse=True)[:num_choices]
    return tuple(
        choice.model_copy(update={"index": index, "candidate": choice.index}) for index, choice in enumerate(ranked)
    )


def _mean_logprob(choice: ResultChoice) -> float:
    return -math.inf if choice.mean_logprob is None else choice.mean_logprob
