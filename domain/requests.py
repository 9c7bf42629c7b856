"""Requests and results of generations and embeddings, and the chunks of a stream.

Requests and results are stored in the form in which these classes dump them, where `kind` tells the classes apart. A
chunk is the smallest piece of a job's stream that is committed, published and replayed.
"""

import base64
import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Discriminator, Field, StringConstraints, Tag, TypeAdapter, model_validator

from domain.jobs import FinishReason, Frozen, JobKind, Usage
from domain.model_names import parse_model_name
from domain.structured_output import MAX_TOOLS, StructuredOutput, ToolCall, ToolDefinition
from domain.template_kwargs import TemplateKwargs


def _utf8(text: str) -> tuple[int, ...]:
    return tuple(text.encode())


class TokenLogprob(Frozen):
    """A token may be only part of a character: `bytes` is what it adds to the UTF-8 of the text, and in `token` bytes
    that are not a whole character are written as `\\xNN`, as in the OpenAI API. A special token adds no bytes; as an
    alternative it has those of its name. In chunks that were stored without bytes, they are those of the text."""

    token: str
    token_id: int
    logprob: float
    bytes: tuple[int, ...] = Field(default_factory=lambda data: _utf8(data["token"]))
    top: tuple[tuple[int, str, float], ...] = ()  # (token id, text, logprob), most likely first
    top_bytes: tuple[tuple[int, ...], ...] = Field(
        default_factory=lambda data: tuple(_utf8(text) for _, text, _ in data["top"])
    )


class TokenChunk(Frozen):
    """The new output of one sequence of a job since its last chunk.

    `sequence_number` counts the chunks of the whole job from 1 without gaps, over all its sequences and attempts. A
    reset deletes the chunks before it from the log; it has the next number, and theirs are not reused. `text` may lag
    behind `token_ids`: text that may still become a stop string, or is part of a UTF-8 character, is in a later chunk.
    The concatenated `text` of one `index` is the sequence's final text, byte for byte.

    Chunks also carry what a later attempt needs: the sum of the tokens' logprobs (with best_of), the prompt's logprobs
    if requested (on the very first chunk), and where the first </think> ends.
    """

    sequence_number: int = Field(ge=1)
    index: int = Field(default=0, ge=0)  # of the sequence within the job
    text: str = ""
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None  # set on the last chunk of its index
    stop_string: str | None = None  # that ended it, on that chunk
    logprobs: tuple[TokenLogprob, ...] | None = None
    sum_logprobs: float | None = None  # of token_ids, with best_of
    num_reasoning_tokens: int | None = None  # of the sequence up to </think>, on the chunk whose tokens complete it
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None  # one per prompt token; the first has none
    is_reset: bool = False  # the job starts over: all earlier chunks are void, and all other fields here are empty


MAX_MESSAGES = 2_048  # an agent at work has hundreds of turns

MAX_PROMPT_CHARS = 1_000_000

MAX_CHOICES = 16  # n and best_of

MAX_ALTERNATIVES = 20  # of a token, in logprobs and prompt_logprobs

MAX_STOP_STRINGS = 16

MAX_LOGIT_BIAS = 1024

MAX_BAD_TOKENS = 1024

MAX_ALLOWED_TOKENS = 16_384

MAX_BAD_WORDS = 64

MAX_PROMPT_TOKENS = 1_000_000

MAX_PROMPT_LOGPROBS = 65_536  # of one prompt, alternatives included; they must fit in one chunk

NO_BOUND = -1  # as max_tokens or top_k: no limit, as on other servers

Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]

TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]

Finite = Annotated[float, Field(allow_inf_nan=False)]

StopString = Annotated[str, StringConstraints(min_length=1, max_length=128)]


def _visible(word: str) -> str:
    if not word.strip():
        raise ValueError("it has no visible character; send a word, or leave it out")
    return word


BadWord = Annotated[str, StringConstraints(min_length=1, max_length=128), AfterValidator(_visible)]


Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


def _unbounded(max_tokens: int | None) -> int | None:
    return None if max_tokens == NO_BOUND else max_tokens


def _off(top_k: int | None) -> int | None:
    return 0 if top_k == NO_BOUND else top_k


def _is_empty(value: object) -> bool:
    return not value


def _some_left(max_tokens: int | None) -> int | None:
    if max_tokens == 0:
        raise ValueError("it is 0, which leaves nothing; send 1 or more, or -1")
    return max_tokens


def _is_none(value: object) -> bool:
    return value is None


class ChatMessage(Frozen):
    role: Literal["system", "user", "assistant", "tool"]
    content: str = Field(max_length=MAX_PROMPT_CHARS)
    name: str | None = Field(default=None, max_length=64)
    reasoning_content: str | None = Field(default=None, max_length=MAX_PROMPT_CHARS)  # of an assistant
    tool_calls: tuple[ToolCall, ...] = Field(default=(), max_length=MAX_TOOLS)  # of an assistant
    tool_call_id: str | None = Field(default=None, max_length=128)  # the call that a tool message answers

    @property
    def begins_an_answer(self) -> bool:
        """Whether the model can go on writing it."""
        return self.role == "assistant" and bool(self.content) and not self.tool_calls


class SamplingParams(Frozen):
    """How tokens are sampled. `None` means the model's own default (its generation config), filled in at submission.

    Fields with `exclude_if` came later than the others: they are dumped only where they are set, so that the hashes of
    older requests stay as they are, and older processes can read new requests that do not use them.
    """

    max_tokens: Annotated[int | None, AfterValidator(_unbounded)] = Field(
        default=None, ge=NO_BOUND, le=1_000_000
    )  # 0: only score the prompt
    min_tokens: int = Field(default=0, ge=0, le=1_000_000)
    temperature: Finite | None = Field(default=None, ge=0, le=2)  # 0 is greedy
    top_p: Finite | None = Field(default=None, ge=0, le=1)  # 0 is greedy, too
    top_k: Annotated[int | None, AfterValidator(_off)] = Field(default=None, ge=NO_BOUND, le=1_000_000)  # 0 is off
    min_p: Finite = Field(default=0.0, ge=0, le=1)
    seed: Seed | None = None  # chosen at submission if the client sends none
    stop: tuple[StopString, ...] = Field(default=(), max_length=MAX_STOP_STRINGS)
    stop_token_ids: tuple[TokenId, ...] = Field(default=(), max_length=64)
    bad_token_ids: tuple[TokenId, ...] = Field(default=(), max_length=MAX_BAD_TOKENS)  # never drawn
    allowed_token_ids: tuple[TokenId, ...] | None = Field(
        default=None, min_length=1, max_length=MAX_ALLOWED_TOKENS, exclude_if=_is_empty
    )  # no others are drawn, not even end tokens; None: all
    bad_words: tuple[BadWord, ...] = Field(
        default=(), max_length=MAX_BAD_WORDS, exclude_if=_is_empty
    )  # never written; gpu_worker/engine/bans.py says what counts
    ignore_eos: bool = False
    include_stop_str_in_output: bool = Field(default=False, exclude_if=_is_empty)  # and the token that ended it
    skip_special_tokens: bool = Field(default=True, exclude_if=bool)  # leave them out of the text
    presence_penalty: Finite = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: Finite = Field(default=0.0, ge=-2, le=2)
    repetition_penalty: Finite = Field(default=1.0, gt=0, le=10)
    logit_bias: dict[TokenId, Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]] = Field(
        default_factory=dict, max_length=MAX_LOGIT_BIAS
    )
    logprobs: int | None = Field(
        default=None, ge=0, le=MAX_ALTERNATIVES
    )  # how many alternatives besides the drawn token
    prompt_logprobs: int | None = Field(
        default=None, ge=0, le=MAX_ALTERNATIVES
    )  # how many alternatives for each prompt token
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    best_of: int | None = Field(default=None, ge=1, le=MAX_CHOICES)  # candidates; the n best by mean logprob are kept
    structured_output: StructuredOutput | None = None

    @property
    def num_sequences(self) -> int:
        """How many sequences run: best_of if set, else n."""
        return self.best_of or self.n

    @model_validator(mode="after")
    def _min_within_max(self) -> Self:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens is {self.min_tokens}, more than max_tokens, which is {self.max_tokens}; lower it"
            )
        return self

    @model_validator(mode="after")
    def _best_of_at_least_n(self) -> Self:
        if self.best_of is not None and self.best_of < self.n:
            raise ValueError(f"best_of is {self.best_of}, less than n, which is {self.n}; raise it or leave it out")
        return self

    @model_validator(mode="after")
    def _scoring_or_some_output(self) -> Self:
        if self.max_tokens == 0 and self.prompt_logprobs is None:
            raise ValueError("max_tokens is 0, which only scores the prompt; set prompt_logprobs, or raise max_tokens")
        if self.max_tokens == 0 and self.num_sequences > 1:
            raise ValueError("max_tokens is 0, so there is no output to choose from; leave out n and best_of")
        return self


class GenerationRequest(Frozen):
    """One generation: a prompt to continue, as text or token ids, or chat messages to answer."""

    kind: Literal["generation"] = "generation"
    model: str = Field(min_length=1, max_length=256)
    prompt: str | None = Field(default=None, min_length=1, max_length=MAX_PROMPT_CHARS)
    messages: tuple[ChatMessage, ...] | None = Field(default=None, min_length=1, max_length=MAX_MESSAGES)
    prompt_token_ids: tuple[TokenId, ...] | None = Field(default=None, min_length=1, max_length=MAX_PROMPT_TOKENS)
    tools: tuple[ToolDefinition, ...] = Field(default=(), max_length=MAX_TOOLS)  # shown by the chat template
    parallel_tool_calls: bool = True
    continue_final_message: bool = False  # the last message is the beginning of the answer
    reasoning_effort: Effort | None = None  # None leaves it to the chat template
    chat_template_kwargs: TemplateKwargs = Field(default_factory=dict)  # more values for the chat template
    params: SamplingParams = SamplingParams()

    @model_validator(mode="after")
    def _tools_in_a_chat(self) -> Self:
        if self.tools and self.messages is None:
            raise ValueError(
                "tools are rendered by the chat template, so they need messages; send messages, or leave out tools"
            )
        return self

    @model_validator(mode="after")
    def _template_in_a_chat(self) -> Self:
        for name in ("reasoning_effort", "chat_template_kwargs"):
            if getattr(self, name) and self.messages is None:
                raise ValueError(f"{name} is for the chat template, so it needs messages; send them, or leave it out")
        return self

    @model_validator(mode="after")
    def _begun_by_the_assistant(self) -> Self:
        if self.continue_final_message and (not self.messages or not self.messages[-1].begins_an_answer):
            raise ValueError(
                "continue_final_message is true, so the last message must be the assistant's, with text and no tool "
                "calls; leave continue_final_message out or send such a message"
            )
        return self

    @model_validator(mode="after")
    def _one_input(self) -> Self:
        if (self.prompt, self.messages, self.prompt_token_ids).count(None) != 2:
            raise ValueError("send exactly one of prompt, messages and prompt_token_ids")
        return self

    @property
    def model_id(self) -> str:
        return parse_model_name(self.model).id

    @property
    def adapter(self) -> str | None:
        return parse_model_name(self.model).adapter

    @property
    def source(self) -> str:
        """The name of the field that has the input."""
        if self.messages is not None:
            return "messages"
        return "prompt" if self.prompt is not None else "prompt_token_ids"


class ResultChoice(Frozen):
    """One finished sequence. `text` is the concatenated text of its chunks.

    With best_of the choices are the n best candidates, best first: `candidate` is the index of its chunks in the
    stream, `mean_logprob` is the value by which it was chosen (None if it ended before its first token).

    `num_reasoning_tokens` counts the tokens up to and including the one that completes the first </think>, even if that
    tag does not end a reasoning section, which only code that knows the model's format can tell. None if there is no
    </think>.
    """

    index: int
    text: str
    finish_reason: FinishReason
    num_tokens: int
    num_reasoning_tokens: int | None = None
    stop_string: str | None = None  # that ended it; no part of `text` unless it was asked to be
    logprobs: tuple[TokenLogprob, ...] | None = None
    candidate: int | None = None
    mean_logprob: float | None = None


class GenerationResult(Frozen):
    """The output of a finished job; partial for cancelled and expired jobs. `usage` counts every candidate's tokens."""

    choices: tuple[ResultChoice, ...]
    usage: Usage
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None  # one per prompt token; the first has none


def best_choices(candidates: Sequence[ResultChoice], num_choices: int) -> tuple[ResultChoice, ...]:
    """The candidates with the highest mean_logprob, best first, renumbered from 0; ties go to the earlier one."""
    ranked = sorted(candidates, key=_mean_logprob, reverse=True)[:num_choices]
    return tuple(
        choice.model_copy(update={"index": index, "candidate": choice.index}) for index, choice in enumerate(ranked)
    )


def _mean_logprob(choice: ResultChoice) -> float:
    return -math.inf if choice.mean_logprob is None else choice.mean_logprob


MAX_INPUTS = 2048

MAX_INPUT_TOKENS = 300_000  # per request, over all its inputs

MAX_NUMBERS = 2**22  # per result (16 MiB), which must fit in one frame and one row

MAX_DIMENSIONS = 65_536

_Text = Annotated[str, StringConstraints(min_length=1, max_length=MAX_PROMPT_CHARS)]

_TokenIds = Annotated[tuple[TokenId, ...], Field(min_length=1, max_length=MAX_INPUT_TOKENS)]

QueryText = Annotated[str, Field(min_length=1, max_length=MAX_PROMPT_CHARS)]

#: The tags keep the names of both branches out of error messages.
EmbeddingInput = Annotated[
    Annotated[_Text, Tag("<text>")] | Annotated[_TokenIds, Tag("<token ids>")],
    Discriminator(lambda value: "<text>" if isinstance(value, str) else "<token ids>"),
]


class EmbeddingRequest(Frozen):
    """One vector for each of `inputs`, which are texts or token ids. Only the first `dimensions` of each are
    returned. An input of more than `truncate_prompt_tokens` is cut at its end; -1: to what the model takes.

    A scoring model reads each input together with one of `queries`: the only one, or the one in the same place. Both
    are texts. Its vectors have one number, the score.
    """

    kind: Literal["embedding"] = "embedding"
    model: str = Field(min_length=1, max_length=256)
    inputs: tuple[EmbeddingInput, ...] = Field(min_length=1, max_length=MAX_INPUTS)
    queries: Annotated[tuple[QueryText, ...], Field(min_length=1, max_length=MAX_INPUTS)] | None = Field(
        default=None, exclude_if=_is_none
    )
    dimensions: int | None = Field(default=None, ge=1, le=MAX_DIMENSIONS)
    truncate_prompt_tokens: Annotated[int | None, AfterValidator(_some_left)] = Field(
        default=None, ge=NO_BOUND, le=MAX_INPUT_TOKENS, exclude_if=_is_none
    )

    @model_validator(mode="after")
    def _bounded_in_total(self) -> Self:
        if self.queries is not None and len(self.queries) not in (1, len(self.inputs)):
            raise ValueError(
                f"queries has {len(self.queries)} texts and inputs has {len(self.inputs)}; send one query, or as many "
                "as inputs"
            )
        if self.num_chars > MAX_PROMPT_CHARS:
            raise ValueError(
                f"inputs: {self.num_chars} characters in total, more than {MAX_PROMPT_CHARS}; send fewer or shorter"
            )
        return self

    @property
    def model_id(self) -> str:
        return parse_model_name(self.model).id

    @property
    def adapter(self) -> str | None:
        return parse_model_name(self.model).adapter

    @property
    def num_chars(self) -> int:
        """Of all texts; a query counts for each input that it is read with."""
        of_inputs = sum(len(text) for text in self.inputs if isinstance(text, str))
        if self.queries is None:
            return of_inputs
        num_readings = len(self.inputs) if len(self.queries) == 1 else 1
        return of_inputs + num_readings * sum(map(len, self.queries))


class EmbeddingResult(Frozen):
    """`embeddings` are unit vectors, or scores, in the order of the inputs: little-endian float32 numbers in base64."""

    kind: Literal["embedding"] = "embedding"
    embeddings: tuple[str, ...]
    dimensions: int
    usage: Usage


def encode_vector(vector: bytes) -> str:
    return base64.b64encode(vector).decode()


JobRequest = GenerationRequest | EmbeddingRequest

JobOutput = GenerationResult | EmbeddingResult


def kind_of(value: Any) -> str:
    """The kind of a request or result, or of its dump. Dumps without a kind, which older versions made, are
    generations."""
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    return str(kind or JobKind.GENERATION)


def is_whole_output(result: JobOutput | None, kind: str) -> bool:
    """Whether this may be what a completed job of this kind has stored; not so, if somebody else has written it."""
    if kind == JobKind.EMBEDDING:
        return isinstance(result, EmbeddingResult)
    return isinstance(result, GenerationResult) and bool(result.choices)


REQUEST: TypeAdapter[JobRequest] = TypeAdapter(
    Annotated[
        Annotated[GenerationRequest, Tag("generation")] | Annotated[EmbeddingRequest, Tag("embedding")],
        Discriminator(kind_of),
    ]
)

RESULT: TypeAdapter[JobOutput] = TypeAdapter(
    Annotated[
        Annotated[GenerationResult, Tag("generation")] | Annotated[EmbeddingResult, Tag("embedding")],
        Discriminator(kind_of),
    ]
)
