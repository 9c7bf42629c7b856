"""Chat completions: the body, its translation to a request, and a job's output as a message or, equal to it, deltas."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast
from uuid import UUID

from pydantic import Discriminator, Field, Tag

from dialects.aliases import MAX_TOKENS
from dialects.bodies import with_body_names
from dialects.openai import (
    FINISH_REASONS,
    ForeignTool,
    GenerationBody,
    OpenAIModel,
    StreamOptions,
    Strings,
    Unsupported,
    build,
    note_unread,
    only,
    refuse_streamed_scores,
    refuse_unused_stream_options,
    spelling_of_params,
    strings,
    tag_of_tool,
    tag_of_tool_choice,
    take_effort,
)
from dialects.openai_formats import ResponseFormat, places_of_answer, wanted_answer
from dialects.openai_messages import Message, to_message
from dialects.openai_views import (
    ChatChoiceView,
    ChatCompletionView,
    ChatLogprobsView,
    ChatMessageView,
    CompletionUsageView,
    FinishReasonName,
    StreamedJob,
    ToolCallView,
    answer_head,
    content_logprobs,
    count_reasoning_tokens,
    prompt_logprobs_view,
    usage_object,
)
from dialects.tools import (
    AskedTools,
    output_of,
    spelling_of_output,
    tools_of,
)
from domain.errors import InvalidRequest
from domain.jobs import FinishReason
from domain.requests import (
    MAX_MESSAGES,
    NO_BOUND,
    Effort,
    GenerationRequest,
    GenerationResult,
    ResultChoice,
    TokenChunk,
    TokenLogprob,
)
from domain.structured_output import MAX_TOOLS
from domain.template_kwargs import TemplateKwargs
from storage.job_queries import JobRecord
from text.models import ModelView
from text.outputs import CallArguments, CallName, ContentPiece, OutputFormat, OutputParser, Piece, ReasoningPiece
from text.parsers import parser_of


class Function(OpenAIModel):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionTool(OpenAIModel):
    type: Annotated[str, only("function")]
    function: Function


Tool = Annotated[
    Annotated[FunctionTool, Tag("<function>")] | Annotated[ForeignTool, Tag("<foreign>")], Discriminator(tag_of_tool)
]


class NamedFunction(OpenAIModel):
    name: str


class NamedTool(OpenAIModel):
    type: Annotated[str, only("function")]
    function: NamedFunction


class AllowedFunction(OpenAIModel):
    type: Annotated[str, only("function")]
    function: NamedFunction


class AllowedFunctions(OpenAIModel):
    mode: Literal["auto", "required"]
    tools: Annotated[list[AllowedFunction], Field(max_length=MAX_TOOLS)]


class AllowedTools(OpenAIModel):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedFunctions


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<mode>")]
    | Annotated[NamedTool, Tag("<named>")]
    | Annotated[AllowedTools, Tag("<allowed>")],
    Discriminator(tag_of_tool_choice),
]


class ChatCompletionBody(GenerationBody):
    ALIASES = GenerationBody.ALIASES | MAX_TOKENS

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    stop: Strings | None = None
    n: int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    max_completion_tokens: int | None = None
    max_tokens: int | None = None  # the older name
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    stream_options: StreamOptions | None = None
    store: bool | None = None
    reasoning_effort: Effort | None = None
    chat_template_kwargs: TemplateKwargs | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None

    # vLLM's
    prompt_logprobs: int | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None

    modalities: Annotated[Any, only(["text"])] = None
    audio: Unsupported = None
    functions: Unsupported = None
    function_call: Unsupported = None
    moderation: Unsupported = None
    web_search_options: Unsupported = None


def to_generation_request(body: ChatCompletionBody, view: ModelView) -> GenerationRequest:
    """`view` is that of the body's model. Raises InvalidRequest, also for tools that the model does not support."""
    try:
        return _generation_request(body, view)
    except InvalidRequest as exc:
        raise with_body_names(exc, spelling_of(body)) from None


def _generation_request(body: ChatCompletionBody, view: ModelView) -> GenerationRequest:
    refuse_unused_stream_options(body)
    refuse_streamed_scores(body)
    _refuse_no_answer(body)
    note_unread(body.chat_template_kwargs, view)
    asked = _asked_tools(body)
    tools = tools_of(asked, view)
    params = body.sampling(
        max_tokens=_max_tokens(body),
        stop=strings(body.stop),
        logprobs=_num_logprobs(body),
        structured_output=output_of(asked, view, tools, wanted_answer(body)),
    )
    messages = [to_message(message, number) for number, message in enumerate(body.messages)]
    request: dict[str, Any] = {"model": body.model, "messages": messages, "tools": tools, "params": params}
    request |= {
        "parallel_tool_calls": body.parallel_tool_calls,
        "reasoning_effort": take_effort(body.reasoning_effort, view, place="reasoning_effort"),
        "chat_template_kwargs": body.chat_template_kwargs,
        "continue_final_message": body.continue_final_message,
    }
    return build(GenerationRequest, request)


def _refuse_no_answer(body: ChatCompletionBody) -> None:
    """The two fields say the same: whether the prompt begins a new message. They default to what the other says."""
    if body.add_generation_prompt is None or body.add_generation_prompt is not bool(body.continue_final_message):
        return
    raise InvalidRequest(
        f"add_generation_prompt is {json.dumps(body.add_generation_prompt)}, and continue_final_message "
        f"{json.dumps(bool(body.continue_final_message))}: the answer is either a new message or continues the last "
        "one; set one of them",
        param="add_generation_prompt",
    )


def spelling_of(body: ChatCompletionBody) -> dict[str, str]:
    spelling = spelling_of_params(**spelling_of_output(_asked_tools(body), places_of_answer(body)))
    return spelling if body.max_completion_tokens is None else spelling | {"max_tokens": "max_completion_tokens"}


def _asked_tools(body: ChatCompletionBody) -> AskedTools:
    choice = body.tool_choice
    return AskedTools(
        definitions={
            number: tool.function.model_dump()
            for number, tool in enumerate(body.tools or ())
            if isinstance(tool, FunctionTool)
        },
        place="tools.{}.function",
        mode=_mode_of(choice),
        name=choice.function.name if isinstance(choice, NamedTool) else None,
        name_place="tool_choice.function.name",
        allowed=_allowed_by(choice),
        is_parallel=body.parallel_tool_calls is not False,
    )


def _mode_of(choice: ToolChoice | None) -> str:
    if isinstance(choice, AllowedTools):
        return choice.allowed_tools.mode
    return "named" if isinstance(choice, NamedTool) else choice or "auto"


def _allowed_by(choice: ToolChoice | None) -> frozenset[str] | None:
    if not isinstance(choice, AllowedTools):
        return None
    return frozenset(tool.function.name for tool in choice.allowed_tools.tools)


def _max_tokens(body: ChatCompletionBody) -> int | None:
    given = {asked for asked in (body.max_tokens, body.max_completion_tokens) if asked is not None}
    bounds = given - {NO_BOUND}
    if len(bounds) > 1:
        raise InvalidRequest(
            f"max_tokens is {body.max_tokens}, max_completion_tokens {body.max_completion_tokens}; send only one",
            param="max_tokens",
        )
    return next(iter(bounds or given), None)


def _num_logprobs(body: ChatCompletionBody) -> int | None:
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequest(
            f"top_logprobs is {body.top_logprobs} but logprobs is not true; set logprobs", param="top_logprobs"
        )
    return (body.top_logprobs or 0) if body.logprobs else None


@dataclass(frozen=True, slots=True)
class AskedIds:
    """Where an answer has the ids of tokens: beside its text, if `prompt` is set, and as their names in logprobs."""

    prompt: tuple[int, ...] | None = None
    are_names: bool = False


NO_IDS = AskedIds()


def asked_ids(body: ChatCompletionBody, generation: GenerationRequest, view: ModelView) -> AskedIds:
    prompt = tuple(view.encode(generation)) if body.return_token_ids else None
    return AskedIds(prompt, are_names=bool(body.return_tokens_as_token_ids))


def from_result(
    record: JobRecord,
    request: GenerationRequest,
    format: OutputFormat,
    service_tier: str | None = None,
    ids: AskedIds = NO_IDS,
) -> ChatCompletionView:
    """The chat completion of a completed job. `request` is the job's request, `format` its model's output format."""
    result = record.result
    assert isinstance(result, GenerationResult)
    parsers = [parser_of(request, format) for _ in range(request.params.n)]
    choices = [_choice(record.job.id, choice, parsers[choice.index], ids) for choice in result.choices]
    whole = {
        **answer_head(record.job.id, "chatcmpl", record.job, service_tier),
        "object": "chat.completion",
        "choices": choices,
        "usage": _usage(result, parsers),
    }
    answer = cast(ChatCompletionView, whole)
    if result.prompt_logprobs is not None:
        answer["prompt_logprobs"] = prompt_logprobs_view(result.prompt_logprobs, request.params.prompt_logprobs or 0)
    if ids.prompt is not None and record.token_ids is not None:
        answer["prompt_token_ids"] = ids.prompt
        for choice in choices:
            choice["token_ids"] = record.token_ids.get(choice["index"], ())
    return answer


class ChatStream:
    """A job's chunks as chat completion chunks."""

    def __init__(
        self,
        job: StreamedJob,
        request: GenerationRequest,
        format: OutputFormat,
        *,
        has_usage: bool,
        service_tier: str | None,
        ids: AskedIds = NO_IDS,
    ) -> None:
        self._job_id = job.job_id
        self._head = answer_head(job.job_id, "chatcmpl", job, service_tier) | {"object": "chat.completion.chunk"}
        self._parsers = [parser_of(request, format) for _ in range(request.params.n)]
        self._has_usage = has_usage
        self._ids = ids

    def begin(self) -> Iterable[Mapping[str, object]]:
        for index in range(len(self._parsers)):
            first = self._chunk(index, {"role": "assistant", "content": "", "refusal": None})
            yield first if self._ids.prompt is None or index else first | {"prompt_token_ids": self._ids.prompt}

    def from_chunk(self, chunk: TokenChunk) -> Iterable[Mapping[str, object]]:
        """The text first, then the finish reason in a separate event. A finish reason that clients do not know is left
        out, as an error event follows."""
        parser = self._parsers[chunk.index]
        pieces = parser.push(chunk.text)
        if chunk.finish_reason is not None:
            pieces += parser.finish(is_cut=chunk.finish_reason is not FinishReason.STOP)
        deltas = [_delta(self._job_id, chunk.index, piece) for piece in pieces]
        token_ids: dict[str, Any] = {} if self._ids.prompt is None else {"token_ids": chunk.token_ids}
        if (chunk.logprobs or token_ids) and not deltas:
            deltas = [{"content": ""}]
        for number, delta in enumerate(deltas):
            if number == 0:
                yield self._chunk(chunk.index, delta, logprobs=_logprobs(chunk.logprobs, self._ids), **token_ids)
            else:
                yield self._chunk(chunk.index, delta)
        if chunk.finish_reason in FINISH_REASONS:
            yield self._chunk(chunk.index, {}, finish_reason=_finish_reason(chunk.finish_reason, parser))

    def finish(self, record: JobRecord) -> Iterable[Mapping[str, object]]:
        assert isinstance(record.result, GenerationResult)
        if self._has_usage:
            yield self._head | {"choices": [], "usage": _usage(record.result, self._parsers)}

    def _chunk(
        self,
        index: int,
        delta: Mapping[str, object],
        *,
        logprobs: object = None,
        finish_reason: str | None = None,
        **token_ids: object,
    ) -> dict[str, object]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason, **token_ids}
        chunk = {**self._head, "choices": [choice]}
        return chunk | {"usage": None} if self._has_usage else chunk


def _usage(result: GenerationResult, parsers: Sequence[OutputParser]) -> CompletionUsageView:
    """`parsers` must have consumed all the text."""
    return usage_object(result.usage, num_reasoning_tokens=count_reasoning_tokens(result.choices, parsers))


def _choice(job_id: UUID, choice: ResultChoice, parser: OutputParser, ids: AskedIds) -> ChatChoiceView:
    pieces = parser.push(choice.text) + parser.finish(is_cut=choice.finish_reason is not FinishReason.STOP)
    content = "".join(piece.text for piece in pieces if isinstance(piece, ContentPiece))
    reasoning = "".join(piece.text for piece in pieces if isinstance(piece, ReasoningPiece))
    calls = _calls(job_id, choice.index, pieces)
    message: ChatMessageView = {"role": "assistant", "content": content or (None if calls else ""), "refusal": None}
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls
    return {
        "index": choice.index,
        "message": message,
        "logprobs": _logprobs(choice.logprobs, ids),
        "finish_reason": _finish_reason(choice.finish_reason, parser),
    }


def _calls(job_id: UUID, index: int, pieces: Sequence[Piece]) -> list[ToolCallView]:
    names = [piece for piece in pieces if isinstance(piece, CallName)]
    arguments = [piece for piece in pieces if isinstance(piece, CallArguments)]
    return [
        {
            "id": _call_id(job_id, index, call.number),
            "type": "function",
            "function": {
                "name": call.name,
                "arguments": "".join(piece.text for piece in arguments if piece.number == call.number),
            },
        }
        for call in names
    ]


def _delta(job_id: UUID, index: int, piece: Piece) -> dict[str, Any]:
    if isinstance(piece, ContentPiece):
        return {"content": piece.text}
    if isinstance(piece, ReasoningPiece):
        return {"reasoning_content": piece.text}
    if isinstance(piece, CallArguments):
        return {"tool_calls": [{"index": piece.number, "function": {"arguments": piece.text}}]}
    call = {
        "index": piece.number,
        "id": _call_id(job_id, index, piece.number),
        "type": "function",
        "function": {"name": piece.name, "arguments": ""},
    }
    return {"tool_calls": [call]}


def _call_id(job_id: UUID, index: int, number: int) -> str:
    """The id of a call, the same each time this output is read."""
    return "call_" + hashlib.sha256(f"{job_id}/{index}/{number}".encode()).hexdigest()[:24]


def _finish_reason(reason: FinishReason, parser: OutputParser) -> FinishReasonName:
    """A call that was cut off must not be executed, so `length` stays `length`."""
    return "tool_calls" if reason is FinishReason.STOP and parser.num_calls else FINISH_REASONS[reason]


def _logprobs(logprobs: Sequence[TokenLogprob] | None, ids: AskedIds) -> ChatLogprobsView | None:
    if logprobs is None:
        return None
    return {"content": content_logprobs(logprobs, are_named_by_ids=ids.are_names), "refusal": None}
