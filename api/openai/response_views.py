"""The published schemas of responses. Answers are built as plain dicts; the fuzz tests hold them to these."""

from typing import Annotated, Any, Literal

from pydantic import Field

from api.openai.response_schemas import ItemStatus, Phase
from api.openai.views import InputTokensDetailsView, OutputTokensDetailsView, TokenLogprobView
from api.views import View

Status = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]


class InputTextView(View):
    type: Literal["input_text"]
    text: str


class OutputTextView(View):
    type: Literal["output_text"]
    text: str
    annotations: list[dict[str, Any]]
    logprobs: list[TokenLogprobView] | None = Field(default=None, description="Of what was sent there are none.")


class RefusalView(View):
    type: Literal["refusal"]
    refusal: str


class ReasoningTextView(View):
    type: Literal["reasoning_text"]
    text: str


class SummaryTextView(View):
    type: Literal["summary_text"]
    text: str


class ItemView(View):
    id: str
    status: ItemStatus


class OutputMessageView(ItemView):
    type: Literal["message"]
    role: Literal["assistant"]
    content: list[Annotated[OutputTextView | RefusalView, Field(discriminator="type")]]
    phase: Phase | None = None


class ReasoningView(ItemView):
    type: Literal["reasoning"]
    summary: list[SummaryTextView]
    content: list[ReasoningTextView] | None = None


class FunctionCallView(ItemView):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class InputMessageView(ItemView):
    type: Literal["message"]
    role: Literal["system", "developer", "user"]
    content: list[InputTextView]
    phase: Phase | None = None


class FunctionCallOutputView(ItemView):
    type: Literal["function_call_output"]
    call_id: str
    output: str | list[InputTextView]


OutputItemView = Annotated[OutputMessageView | ReasoningView | FunctionCallView, Field(discriminator="type")]
InputItemView = InputMessageView | OutputMessageView | ReasoningView | FunctionCallView | FunctionCallOutputView


class InputItemListView(View):
    object: Literal["list"]
    data: list[InputItemView]
    first_id: str = Field(description="Empty on an empty page.")
    last_id: str
    has_more: bool


class InputTokensView(View):
    object: Literal["response.input_tokens"]
    input_tokens: int


class ResponseErrorView(View):
    code: Literal["server_error"]
    message: str
    type: str = Field(description="Our code of the error.")


class IncompleteDetailsView(View):
    reason: Literal["max_output_tokens"] | None
    stop_reason: Literal["deadline"] | None = None


class ResponseToolView(View):
    type: Literal["function"]
    name: str
    description: str | None
    parameters: dict[str, Any] | None
    strict: bool | None


class NamedToolView(View):
    type: Literal["function"]
    name: str


class PlainFormatView(View):
    type: Literal["text", "json_object"]


class JsonSchemaFormatView(View):
    type: Literal["json_schema"]
    name: str
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class ResponseTextView(View):
    format: PlainFormatView | JsonSchemaFormatView = Field(discriminator="type")


class ReasoningConfigView(View):
    effort: None
    summary: None


class ResponseInputTokensDetailsView(InputTokensDetailsView):
    cache_write_tokens: int


class ResponseUsageView(View):
    input_tokens: int
    input_tokens_details: ResponseInputTokensDetailsView
    output_tokens: int
    output_tokens_details: OutputTokensDetailsView
    total_tokens: int


class ResponseView(View):
    id: str
    object: Literal["response"]
    created_at: int = Field(description="Seconds since 1970.")
    status: Status
    background: bool
    completed_at: int | None
    error: ResponseErrorView | None
    incomplete_details: IncompleteDetailsView | None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputItemView]
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: ReasoningConfigView
    safety_identifier: str | None
    prompt_cache_key: str | None
    service_tier: Literal["default", "flex", "priority", "fast"]
    store: bool
    temperature: float | None
    text: ResponseTextView
    tool_choice: Literal["none", "auto", "required"] | NamedToolView
    tools: list[ResponseToolView]
    top_logprobs: int
    top_p: float | None
    presence_penalty: float
    frequency_penalty: float
    truncation: Literal["disabled"]
    usage: ResponseUsageView | None = Field(description="Of one that has ended.")
    user: str | None
