"""What is asked for (GenerationRequest) and what comes back (GenerationResult). Both are stored as they stand here."""

from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from domain.chunks import TokenLogprob
from domain.jobs import FinishReason, Frozen, Usage
from domain.structured_output import StructuredOutput

MAX_MESSAGES = 256
MAX_PROMPT_CHARS = 1_000_000
MAX_CHOICES = 8
MAX_STOP_STRINGS = 16
MAX_LOGIT_BIAS = 1024

Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
StopString = Annotated[str, StringConstraints(min_length=1, max_length=128)]


class ChatMessage(Frozen):
    role: Literal["system", "user", "assistant", "tool"]
    content: str = Field(max_length=MAX_PROMPT_CHARS)


class SamplingParams(Frozen):
    """How tokens are drawn. `None` means the model's own default (its generation config), resolved at submit."""

    max_tokens: int | None = Field(default=None, ge=1, le=1_000_000)
    min_tokens: int = Field(default=0, ge=0, le=1_000_000)
    temperature: Finite | None = Field(default=None, ge=0, le=2)  # 0 is greedy
    top_p: Finite | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0, le=1_000_000)  # 0 is off
    min_p: Finite = Field(default=0.0, ge=0, le=1)
    seed: Seed | None = None  # drawn at accept where the client gives none
    stop: tuple[StopString, ...] = Field(default=(), max_length=MAX_STOP_STRINGS)
    stop_token_ids: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(), max_length=64)
    ignore_eos: bool = False
    presence_penalty: Finite = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: Finite = Field(default=0.0, ge=-2, le=2)
    repetition_penalty: Finite = Field(default=1.0, gt=0, le=10)
    logit_bias: dict[Annotated[int, Field(ge=0)], Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]] = (
        Field(default_factory=dict, max_length=MAX_LOGIT_BIAS)
    )
    logprobs: int | None = Field(default=None, ge=0, le=20)  # how many alternatives beside the drawn token
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    structured_output: StructuredOutput | None = None

    @model_validator(mode="after")
    def _min_within_max(self) -> Self:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens is {self.min_tokens}, more than max_tokens {self.max_tokens}; lower it")
        return self


class GenerationRequest(Frozen):
    """One generation: a plain prompt to continue, or chat messages to answer."""

    model: str = Field(min_length=1, max_length=256)
    prompt: str | None = Field(default=None, min_length=1, max_length=MAX_PROMPT_CHARS)
    messages: tuple[ChatMessage, ...] | None = Field(default=None, min_length=1, max_length=MAX_MESSAGES)
    params: SamplingParams = SamplingParams()

    @model_validator(mode="after")
    def _one_input(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages, exactly one of them")
        return self


class ResultChoice(Frozen):
    """One finished sequence. `text` is the concatenated text of its chunks."""

    index: int
    text: str
    finish_reason: FinishReason
    num_tokens: int
    logprobs: tuple[TokenLogprob, ...] | None = None


class GenerationResult(Frozen):
    """What a finished job holds; partial for cancelled and expired jobs."""

    choices: tuple[ResultChoice, ...]
    usage: Usage
