"""The published schemas of what the OpenAI routes answer, the pages of lists, and usage.

What all views are, and the pages in which every list is answered.

The published schemas of what the OpenAI routes answer. Answers are built as plain dicts; the fuzz tests hold them
to these.

What a job used, in the words of the routes.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from domain.jobs import Usage
from domain.requests import ResultChoice
from text.outputs import END_THINK, OutputParser


class View(BaseModel):
    """The published schema of an answer, which is built as a plain dict."""

    model_config = ConfigDict(extra="forbid")


class DeletedView(View):
    id: str
    object: str
    deleted: bool


class PageView(View):
    """Subclasses have the `data`."""

    object: Literal["list"]
    first_id: str | None
    last_id: str | None
    has_more: bool


def page(data: Sequence[Mapping[str, Any]], limit: int) -> dict[str, Any]:
    """As `PageView` says. `data` may hold more than `limit`, which says that there is more."""
    shown = data[:limit]
    return {
        "object": "list",
        "data": shown,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
        "has_more": len(data) > limit,
    }


def timestamp(at: datetime | None) -> str | None:
    """UTC to the millisecond, as 2026-10-20T12:00:00.000Z."""
    if at is None:
        return None
    return at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


FinishReasonName = Literal["stop", "length", "tool_calls"]


class ModelCardView(View):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int | None = Field(description="Tokens, prompt and output together; null while it is unavailable.")
    loaded: bool | None = Field(description="A worker is ready for its jobs; null while the database does not answer.")
    unavailable: str | None = Field(description="Why no job is taken for it; null where jobs are.")


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
    reasoning_content: str | None = None
    tool_calls: list[ToolCallView] | None = None


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


class AnswerView(View):
    """What both kinds of completions have."""

    id: str
    created: int = Field(description="Seconds since 1970.")
    model: str
    service_tier: Literal["default", "flex", "priority", "fast"]
    system_fingerprint: str
    usage: CompletionUsageView


class ChatCompletionView(AnswerView):
    object: Literal["chat.completion"]
    choices: list[ChatChoiceView]
    metadata: dict[str, str] | None = Field(default=None, description="Of a stored one.")


class InputTokensDetailsView(View):
    cached_tokens: int


class OutputTokensDetailsView(View):
    reasoning_tokens: int


class ChatCompletionListView(PageView):
    data: list[ChatCompletionView]


class StoredMessageView(View):
    id: str
    role: Literal["system", "user", "assistant", "tool"]
    content: str
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[ToolCallView] | None = None


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


class CompletionView(AnswerView):
    object: Literal["text_completion"]
    choices: list[CompletionChoiceView]


def usage_object(usage: Usage, *, num_reasoning_tokens: int = 0) -> dict[str, object]:
    """Of chat completions and completions."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": num_reasoning_tokens},
    }


def response_usage(usage: Usage, *, num_reasoning_tokens: int) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": num_reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def count_reasoning_tokens(choices: Sequence[ResultChoice], parsers: Sequence[OutputParser]) -> int:
    """The tokens of all choices up to and including the one that completes </think>; all of a choice that was still
    thinking when it ended. `parsers`, by index, have taken the whole text of their choices."""
    return sum(_of_choice(choice) for choice in choices if parsers[choice.index].has_reasoning)


def _of_choice(choice: ResultChoice) -> int:
    if choice.num_reasoning_tokens is not None:
        return choice.num_reasoning_tokens
    return choice.num_tokens if END_THINK not in choice.text else 0  # an older job, of which nobody counted them
