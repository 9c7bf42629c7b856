"""The response schemas of the OpenAI routes, list pages, and usage.

A view is a TypedDict: both the published schema of an answer and the type of the dict that orjson encodes
(docs/adr/0031).
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from typing import Annotated, Any, Literal, NotRequired, Protocol
from uuid import UUID

from pydantic import ConfigDict, Field, WithJsonSchema, with_config
from typing_extensions import TypedDict

from domain.catalog import Task
from domain.jobs import Usage, external_id
from domain.requests import ResultChoice, TokenLogprob
from text.outputs import END_THINK, OutputParser

#: The reference to a schema in the OpenAPI document.
REFERENCE = "#/components/schemas/{model}"

#: A time as `timestamp` writes it.
Timestamp = Annotated[str, WithJsonSchema({"type": "string", "format": "date-time"})]


@with_config(ConfigDict(extra="forbid"))
class View(TypedDict):
    """The base of all views. An answer has only the keys of its view."""


class DeletedView(View):
    id: str
    object: str
    deleted: bool


class PageView(View):
    """A page of a list. Subclasses add `data`."""

    object: Literal["list"]
    first_id: str | None
    last_id: str | None
    has_more: bool


def page(data: Sequence[Mapping[str, Any]], limit: int) -> dict[str, Any]:
    """A page in the form of `PageView`. If `data` has one item more than `limit`, there are further pages."""
    shown = data[:limit]
    return {
        "object": "list",
        "data": shown,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
        "has_more": len(data) > limit,
    }


def optional_timestamp(at: datetime | None) -> str | None:
    return None if at is None else timestamp(at)


@lru_cache(maxsize=1024)  # a job that ended at once has one time four times, and so have those accepted with it
def timestamp(at: datetime) -> str:
    """UTC to the millisecond, such as 2026-10-20T12:00:00.000Z."""
    return at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


FinishReasonName = Literal["stop", "length", "tool_calls"]

ServiceTierName = Literal["default", "flex", "priority", "fast"]


class ModelCardView(View):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: Annotated[
        int | None, Field(description="Tokens of prompt and output together; null while unavailable.")
    ]
    loaded: Annotated[
        bool | None, Field(description="Whether a worker is ready for its jobs; null while this is not known.")
    ]
    load_percent: Annotated[
        int | None, Field(description="How far it has been loaded; null if it is not being loaded or unknown.")
    ]
    unavailable: Annotated[str | None, Field(description="Why the model does not accept jobs; null if it does.")]
    parent: Annotated[str | None, Field(description="The model that a LoRA adapter belongs to; null for a model.")]
    task: Annotated[Task | None, Field(description="What it is made for; null while unavailable.")]


class ModelListView(View):
    object: Literal["list"]
    data: list[ModelCardView]


class PromptTokensDetailsView(View):
    cached_tokens: int


class CompletionTokensDetailsView(View):
    reasoning_tokens: int


class CompletionUsageView(View):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetailsView
    completion_tokens_details: CompletionTokensDetailsView


class CalledFunctionView(View):
    name: str
    arguments: str


class ToolCallView(View):
    id: str
    type: Literal["function"]
    function: CalledFunctionView


class ChatMessageView(View):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: NotRequired[str | None]
    tool_calls: NotRequired[list[ToolCallView] | None]


class TokenView(View):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprobView(TokenView):
    top_logprobs: list[TokenView]


class ChatLogprobsView(View):
    content: list[TokenLogprobView] | None
    refusal: None


class ChatChoiceView(View):
    index: int
    message: ChatMessageView
    logprobs: ChatLogprobsView | None
    finish_reason: FinishReasonName
    token_ids: NotRequired[Sequence[int]]


class AnswerHeadView(View):
    """The fields that chat completions, completions and their chunks have in common."""

    id: str
    created: Annotated[int, Field(description="Seconds since 1970.")]
    model: str
    service_tier: ServiceTierName
    system_fingerprint: str


class AnswerView(AnswerHeadView):
    usage: CompletionUsageView


class PromptScoreView(View):
    logprob: float
    rank: Annotated[int | None, Field(description="From 1; null if the token is not among those asked for.")]
    decoded_token: str


class ChatCompletionView(AnswerView):
    object: Literal["chat.completion"]
    choices: list[ChatChoiceView]
    prompt_logprobs: NotRequired[list[dict[str, PromptScoreView] | None]]
    prompt_token_ids: NotRequired[Sequence[int]]


class StoredChatCompletionView(ChatCompletionView):
    metadata: dict[str, str]


class InputTokensDetailsView(View):
    cached_tokens: int


class OutputTokensDetailsView(View):
    reasoning_tokens: int


class ChatCompletionListView(PageView):
    data: list[StoredChatCompletionView]


class StoredMessageView(View):
    id: str
    role: Literal["system", "user", "assistant", "tool"]
    content: str
    name: NotRequired[str | None]
    tool_call_id: NotRequired[str | None]
    tool_calls: NotRequired[list[ToolCallView] | None]


class StoredMessageListView(PageView):
    data: list[StoredMessageView]


class CompletionLogprobsView(View):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoiceView(View):
    index: int
    text: str
    logprobs: CompletionLogprobsView | None
    finish_reason: Literal["stop", "length"]
    prompt_logprobs: NotRequired[list[dict[str, PromptScoreView] | None]]
    prompt_token_ids: NotRequired[Sequence[int] | None]
    token_ids: NotRequired[Sequence[int] | None]


class CompletionView(AnswerView):
    object: Literal["text_completion"]
    choices: list[CompletionChoiceView]


class AnsweredJob(Protocol):
    """What every answer needs to know about its job. Both `Job`, the row, and `Run`, a request in progress, have it."""

    @property
    def model_name(self) -> str: ...
    @property
    def model_revision(self) -> str: ...
    @property
    def priority(self) -> int: ...
    @property
    def created_at(self) -> datetime: ...


class StreamedJob(AnsweredJob, Protocol):
    @property
    def job_id(self) -> UUID: ...


def tier_of(asked: str | None, priority: int) -> ServiceTierName:
    """The tier used. `fast` is an alias of `priority` and is echoed only if it was requested."""
    if asked == "fast":
        return "fast"
    return "priority" if priority > 0 else "flex" if priority < 0 else "default"


def content_logprobs(logprobs: Sequence[TokenLogprob], *, are_named_by_ids: bool = False) -> list[TokenLogprobView]:
    """`logprobs.content`: the tokens of the content, without the end token, which has no text."""
    return [_logprob_object(logprob, are_named_by_ids) for logprob in logprobs if logprob.bytes]


def name_by_id(token_id: int) -> str:
    """vLLM's names of tokens, which are unique."""
    return f"token_id:{token_id}"


def _logprob_object(logprob: TokenLogprob, is_named_by_ids: bool) -> TokenLogprobView:
    top = [
        _token_object(name_by_id(token_id) if is_named_by_ids else text, value, utf8)
        for (token_id, text, value), utf8 in zip(logprob.top, logprob.top_bytes, strict=True)
    ]
    name = name_by_id(logprob.token_id) if is_named_by_ids else logprob.token
    return {**_token_object(name, logprob.logprob, logprob.bytes), "top_logprobs": top}


def prompt_logprobs_view(
    entries: Sequence[TokenLogprob | None], num_top: int
) -> list[dict[str, PromptScoreView] | None]:
    """vLLM's: for each prompt token itself and the most likely ones, by their ids. The first token has none."""
    return [None if entry is None else _scores(entry, num_top) for entry in entries]


def _scores(entry: TokenLogprob, num_top: int) -> dict[str, PromptScoreView]:
    scores: dict[str, PromptScoreView] = {
        str(token_id): {"logprob": value, "rank": rank, "decoded_token": text}
        for rank, (token_id, text, value) in enumerate(entry.top[:num_top], start=1)
    }
    own: PromptScoreView = {"logprob": entry.logprob, "rank": None, "decoded_token": entry.token}
    return {str(entry.token_id): own} | scores


def _token_object(text: str, logprob: float, utf8: Sequence[int]) -> TokenView:
    return {"token": text, "logprob": logprob, "bytes": list(utf8)}


class ResponseInputTokensDetailsView(InputTokensDetailsView):
    cache_write_tokens: int


class ResponseUsageView(View):
    input_tokens: int
    input_tokens_details: ResponseInputTokensDetailsView
    output_tokens: int
    output_tokens_details: OutputTokensDetailsView
    total_tokens: int


def answer_head(job_id: UUID, prefix: str, job: AnsweredJob, service_tier: str | None) -> AnswerHeadView:
    """`service_tier` is the one that was requested."""
    return {
        "id": external_id(job_id, prefix),
        "created": int(job.created_at.timestamp()),
        "model": job.model_name,
        "service_tier": tier_of(service_tier, job.priority),
        "system_fingerprint": f"fp_{job.model_revision[:16]}",
    }


def usage_object(usage: Usage, *, num_reasoning_tokens: int = 0) -> CompletionUsageView:
    """The usage of a chat or text completion."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": num_reasoning_tokens},
    }


def response_usage(usage: Usage, *, num_reasoning_tokens: int) -> ResponseUsageView:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": num_reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def count_reasoning_tokens(choices: Sequence[ResultChoice], parsers: Sequence[OutputParser]) -> int:
    """The tokens of all choices up to and including the one that completes </think>; all tokens of a choice that ended
    while thinking. `parsers`, by index, have consumed the whole text of their choices."""
    return sum(_of_choice(choice) for choice in choices if parsers[choice.index].has_reasoning)


def _of_choice(choice: ResultChoice) -> int:
    if choice.num_reasoning_tokens is not None:
        return choice.num_reasoning_tokens
    return choice.num_tokens if END_THINK not in choice.text else 0  # a job from before they were counted
