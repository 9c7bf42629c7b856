"""The published schemas of what the OpenAI routes answer. Answers are built as plain dicts; the fuzz tests hold them
to these."""

from typing import Literal

from pydantic import Field

from api.views import PageView, View

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
