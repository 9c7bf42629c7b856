"""Shared by the bodies of the OpenAI routes: strictness, sampling parameters, output formats and tools.

A body declares only types; the limits are those of `domain.requests`, to which every body is converted.

A strict schema is enforced completely, or refused with the keyword that cannot be. From any other schema, what cannot
be enforced is removed, as JSON Schema prescribes for unknown keywords and formats.
"""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Final, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    ValidationError,
)
from pydantic_core import PydanticCustomError

from dialects.aliases import OUTPUT, SAMPLING, Aliases
from dialects.bodies import UNSUPPORTED, invalid_request
from dialects.fields import FOREIGN_TOOLS, is_foreign_tool, note_ignored
from dialects.native import MetadataKey, MetadataValue, TimeoutSeconds
from domain.errors import InvalidRequest, UnsupportedParameter
from domain.job_options import Timeouts
from domain.jobs import FinishReason, FirstErrorModel
from domain.json_schemas import gather
from domain.requests import MAX_STOP_STRINGS, Effort, SamplingParams
from domain.strict_schemas import closed, enforceable
from domain.structured_output import (
    MAX_CALLS_BYTES,
    CallableTool,
    StructuredOutput,
    ToolCalls,
    ToolDefinition,
    bounded,
    check_keywords,
    check_structure,
)
from text.call_formats import CallFormat, call_format
from text.models import ModelView, refused_effort

#: The reasons that clients know. A job that ended for any other reason is answered with an error.
FINISH_REASONS: Final[dict[FinishReason, Literal["stop", "length"]]] = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
}

PRIORITY_BY_SERVICE_TIER = {"auto": 0, "default": 0, "flex": -5, "priority": 5, "fast": 5}

Domain = TypeVar("Domain", bound=BaseModel)


class OpenAIModel(FirstErrorModel):
    """A body or part of one: unknown fields are refused; null means absent."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    ALIASES: ClassVar[Aliases] = {}


def refuse(reason: str) -> PydanticCustomError:
    return PydanticCustomError(UNSUPPORTED, "{reason}", {"reason": reason})


def _refuse_any(value: Any) -> None:
    """Refuse every value but an empty one, which asks for nothing."""
    if value is not None and value not in ("", [], {}):
        raise refuse("is not supported; leave it out")


def only(*harmless: Any) -> AfterValidator:
    """A field whose `harmless` values change nothing and whose other values are not supported."""

    def check(value: Any) -> Any:
        if value is not None and value not in harmless:
            shown = " or ".join(repr(one) for one in harmless)
            raise refuse(f"is only supported as {shown}; leave it out")
        return value

    return AfterValidator(check)


Unsupported = Annotated[Any, AfterValidator(_refuse_any)]

MAX_PARTS = 1024  # per message content


class ForeignTool(OpenAIModel):
    """A tool other than a function. Only its place among the tools is kept."""

    model_config = ConfigDict(extra="ignore")

    type: Annotated[str, Field(json_schema_extra={"enum": sorted(FOREIGN_TOOLS)})]


def tag_of_tool(tool: object) -> str:
    return "<foreign>" if isinstance(tool, ForeignTool) or is_foreign_tool(tool) else "<function>"


def tag_of_tool_choice(choice: object) -> str:
    if isinstance(choice, str):
        return "<mode>"
    kind = choice.get("type") if isinstance(choice, dict) else getattr(choice, "type", None)
    return "<allowed>" if kind == "allowed_tools" else "<named>"


#: One stop string, or several. The tags keep the two branches out of error messages.
Strings = Annotated[
    Annotated[str, Tag("<string>")] | Annotated[list[str], Field(max_length=MAX_STOP_STRINGS), Tag("<strings>")],
    Discriminator(lambda value: "<string>" if isinstance(value, str) else "<strings>"),
]

Metadata = Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)]

CallerId = Annotated[str, StringConstraints(max_length=512)]

ServiceTier = Literal["auto", "default", "flex", "priority", "fast"]


class TimeoutFields(OpenAIModel):
    """Our own fields, which every body has that makes a job. They go before the headers of the same names."""

    start_timeout: TimeoutSeconds | None = Field(
        default=None, description="How many seconds the job may wait in the queue."
    )
    run_timeout: TimeoutSeconds | None = Field(
        default=None, description="How many seconds the job may run once started."
    )

    @property
    def timeouts(self) -> Timeouts:
        return Timeouts(self.start_timeout, self.run_timeout)


def publish_default_model(schema: dict[str, Any]) -> None:
    """Say in a body's schema that `model` may be left out. The route fills it in before the body is validated."""
    schema["required"] = [name for name in schema.get("required", ()) if name != "model"]


def publish_bounds(schema: dict[str, Any]) -> None:
    """Add the limits of the sampling parameters to a body's schema; limits of its own take precedence."""
    publish_default_model(schema)
    for name, bounds_of_field in SamplingParams.model_json_schema()["properties"].items():
        bounds_by_type = {branch.get("type"): branch for branch in bounds_of_field.get("anyOf", [bounds_of_field])}
        for branch in schema["properties"].get(name, {}).get("anyOf", ()):
            bounds = bounds_by_type.get(branch.get("type"), {})
            known = {"title", "default", *branch} - {"items", "additionalProperties"}
            branch |= {key: bound for key, bound in bounds.items() if key not in known}


class SamplingBody(TimeoutFields):
    """What every route that generates text can be told about sampling, with the names of SamplingParams."""

    model_config = ConfigDict(json_schema_extra=publish_bounds)

    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    seed: int | None = None

    # Extensions
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    bad_token_ids: list[int] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    use_cache: bool | None = None

    def sampling(self, **given: Any) -> SamplingParams:
        """The sampling parameters of this body. `given` has those that the body names differently; None leaves the
        default. Raises InvalidRequest, whose names are those of SamplingParams."""
        fields = {name: getattr(self, name, None) for name in SamplingParams.model_fields}
        return build(SamplingParams, fields | given)


class GenerationBody(SamplingBody):
    """The parameters of every route that generates text, and the extensions that arrive through `extra_body`."""

    ALIASES = SAMPLING | OUTPUT

    model: Annotated[str, StringConstraints(min_length=1, max_length=256)]
    stream: bool | None = None

    # About the caller; no effect here.
    user: CallerId | None = None
    safety_identifier: CallerId | None = None
    prompt_cache_key: CallerId | None = None

    service_tier: ServiceTier | None = None
    metadata: Metadata | None = None

    # An extension
    structured_output: StructuredOutput | None = None


class StreamOptions(OpenAIModel):
    include_usage: bool | None = None


def refuse_unused_stream_options(body: GenerationBody) -> None:
    """Refuse stream_options without stream, as OpenAI does. Raises InvalidRequest."""
    if getattr(body, "stream_options", None) is not None and not body.stream:
        raise InvalidRequest(
            "stream_options is set but stream is not true; set stream, or leave out stream_options",
            param="stream_options",
        )


def refuse_streamed_scores(body: GenerationBody) -> None:
    """Raises UnsupportedParameter: a prompt's logprobs are only part of whole answers, as in vLLM."""
    if getattr(body, "prompt_logprobs", None) is not None and body.stream:
        raise UnsupportedParameter(
            "prompt_logprobs cannot be streamed; leave out stream or prompt_logprobs", param="prompt_logprobs"
        )


def take_effort(effort: Effort | None, view: ModelView, *, place: str) -> Effort | None:
    """The effort that the chat template is given. One for a model that does not reason is ignored and noted. Raises
    UnsupportedParameter for one that the template has no way to apply."""
    if effort is None or view.thinking.takes(effort):
        return effort
    if view.output_format.reasoning is None and not view.thinking.has_level:
        note_ignored([place])
        return None
    raise refused_effort(effort, view, place)


def note_unread(kwargs: Mapping[str, Any] | None, view: ModelView) -> None:
    """Note the values that no chat template of the model reads."""
    note_ignored(f"chat_template_kwargs.{name}" for name in kwargs or () if view.template_ignores(name))


def build(model: type[Domain], fields: dict[str, Any]) -> Domain:
    """A domain object from the `fields` that are given (not None). Raises InvalidRequest."""
    try:
        return model.model_validate({name: value for name, value in fields.items() if value is not None})
    except ValidationError as exc:
        raise invalid_request(exc, model) from None


def build_at(place: str, model: type[Domain], fields: dict[str, Any]) -> Domain:
    """Like `build`, for part of a body: an error has the full path."""
    try:
        return build(model, fields)
    except InvalidRequest as exc:
        exc.message = f"{place}: {exc.message}"
        exc.param = f"{place}.{exc.param}" if exc.param else place
        raise


def spelling_of_params(**names: str) -> dict[str, str]:
    """What a generation body calls the fields of our requests: `names`, and what all routes have in common."""
    return names | {"prompt_token_ids": "prompt"}


def strings(value: str | list[str] | None) -> list[str] | None:
    return [value] if isinstance(value, str) else value


MAX_REMEMBERED = 1_024  # tool parameters, of at most MAX_SCHEMA_BYTES each


def answer_of(schema: dict[str, Any], *, is_strict: bool, place: str) -> StructuredOutput:
    """The structured output for a JSON schema. `place` is the schema's path in the body. Raises InvalidRequest."""
    try:
        if is_strict:
            return _output(place, json_schema=schema)
        kept = bounded(schema)
        check_structure(kept)
        return _output(place, json_schema=enforceable(gather(kept)))
    except ValueError as exc:
        raise _refusal(exc, place) from None


def callable_tool(tool: ToolDefinition, *, place: str) -> CallableTool:
    """The tool with its arguments' schema. `place` is the path of its parameters in the body. Raises InvalidRequest."""
    schema = tool.parameters or {"type": "object", "properties": {}}
    try:
        arguments = _arguments_of(json.dumps(bounded(schema)), is_strict=tool.strict is True)
        return CallableTool(name=tool.name, arguments=arguments)
    except ValueError as exc:
        raise _refusal(exc, place) from None


@functools.lru_cache(maxsize=MAX_REMEMBERED)
def _arguments_of(schema_json: str, *, is_strict: bool) -> dict[str, Any]:
    """Cached, since agents send the same tools at every turn. Callers must not modify the result."""
    schema = json.loads(schema_json)
    check_structure(schema)
    if is_strict:
        check_keywords(schema)
        return closed(gather(schema), is_strict=True)
    return closed(enforceable(gather(schema)), is_strict=False)


def with_calls(answer: StructuredOutput | None, calls: ToolCalls) -> StructuredOutput:
    return StructuredOutput(calls=calls) if answer is None else answer.model_copy(update={"calls": calls})


def _output(place: str, **fields: Any) -> StructuredOutput:
    try:
        return StructuredOutput(**fields)
    except ValidationError as exc:
        refusal = invalid_request(exc, StructuredOutput)
        raise InvalidRequest(f"{place}: {refusal.message}", param=place) from None


def _refusal(exc: ValueError, place: str) -> InvalidRequest:
    return InvalidRequest(f"{place}: {exc}", param=place)


@dataclass(frozen=True, slots=True)
class AskedTools:
    """What a body says about tools. `definitions` are its functions, by their index among all tools; `place` is the
    path of a tool in the body, with `{}` for the index."""

    definitions: Mapping[int, dict[str, Any]]
    place: str
    mode: str  # none, auto, required, or named
    name: str | None = None  # of the function that must be called
    name_place: str = "tool_choice.name"
    is_parallel: bool = True
    allowed: frozenset[str] | None = None  # the names of the functions that may be called; None: all

    @property
    def must_call(self) -> bool:
        return self.mode in ("required", "named")


def tools_of(asked: AskedTools, view: ModelView) -> tuple[ToolDefinition, ...]:
    """The tools that the model is shown: none if it must not call any. Raises InvalidRequest."""
    if not asked.definitions:
        if asked.must_call:
            raise InvalidRequest("tool_choice requires a call but tools has no functions; add some", param="tools")
        return ()
    tools = tuple(
        build_at(asked.place.format(number), ToolDefinition, definition)
        for number, definition in asked.definitions.items()
    )
    if len({tool.name for tool in tools}) < len(tools):
        raise InvalidRequest("two tools have the same name; rename one", param="tools")
    if asked.mode == "none":
        return ()
    if asked.allowed is not None:
        tools = _allowed_tools(asked.allowed, tools)
    if view.output_format.tools is None:
        raise UnsupportedParameter(
            f"the chat template of {view.spec.id} has no tool call format that is supported here; remove tools",
            param="tools",
        )
    return tools


def _allowed_tools(allowed: frozenset[str], tools: tuple[ToolDefinition, ...]) -> tuple[ToolDefinition, ...]:
    """The others are not shown to the model, which so cannot call them. Raises InvalidRequest."""
    unknown = min(allowed - {tool.name for tool in tools}, default=None)
    if unknown is not None or not allowed:
        raise InvalidRequest(
            f"tool_choice allows {str(unknown or 'nothing')[:64]!r}, which is not one of the tools; name some of them",
            param="tool_choice",
        )
    return tuple(tool for tool in tools if tool.name in allowed)


def output_of(
    asked: AskedTools, view: ModelView, tools: tuple[ToolDefinition, ...], answer: StructuredOutput | None
) -> StructuredOutput | None:
    """What the output must be. Calls if one is required; if one is only allowed, calls or `answer`, provided there is
    an `answer`. Raises InvalidRequest."""
    if not tools or (answer is None and not asked.must_call):
        return answer
    return with_calls(None if asked.must_call else answer, _calls(asked, view, tools))


def spelling_of_output(asked: AskedTools, answer: Mapping[str, str]) -> dict[str, str]:
    """The path in the body of each part of a structured output. `answer` has those of parts other than calls."""
    places = [
        (f"structured_output.calls.tools.{index}", f"{asked.place.format(number)}.parameters")
        for index, (number, _) in enumerate(_callable_ones(asked))
    ]
    return {**answer, **dict(places), "structured_output.calls": "tools"}


def _callable_ones(asked: AskedTools) -> list[tuple[int, dict[str, Any]]]:
    """The functions that may be called, with their index among all tools."""
    return [
        (number, definition)
        for number, definition in asked.definitions.items()
        if asked.name in (None, definition["name"]) and (asked.allowed is None or definition["name"] in asked.allowed)
    ]


def _calls(asked: AskedTools, view: ModelView, tools: tuple[ToolDefinition, ...]) -> ToolCalls:
    assert view.output_format.tools is not None
    if not _callable_ones(asked):
        raise InvalidRequest(
            f"tool_choice names {str(asked.name)[:64]!r}, which is not one of the tools; name one of them",
            param=asked.name_place,
        )
    format = call_format(view.output_format.tools)
    token_ids = _special_token_ids(view, format)
    has_optional_marker = format.is_bare is not None
    fields = {
        "format": format.name,
        "tools": _callable_tools(asked, tools),
        "is_single": asked.name is not None or not asked.is_parallel,
        "marker_token_id": next(filter(None, map(token_ids.get, format.begins)), None) if has_optional_marker else None,
        "token_ids": {} if has_optional_marker else token_ids,
    }
    try:
        return ToolCalls.model_validate(fields)
    except ValidationError as exc:
        refusal = invalid_request(exc, ToolCalls)
        raise InvalidRequest(f"tools: {refusal.message}", param="tools") from None


def _callable_tools(asked: AskedTools, tools: tuple[ToolDefinition, ...]) -> list[CallableTool]:
    """The callable tools, up to the first that exceeds the limit on their size, which is then refused."""
    by_name = {tool.name: tool for tool in tools}
    callable_tools: list[CallableTool] = []
    num_bytes = 0
    for number, definition in _callable_ones(asked):
        place = f"{asked.place.format(number)}.parameters"
        callable_tools.append(callable_tool(by_name[definition["name"]], place=place))
        num_bytes += len(json.dumps(callable_tools[-1].arguments))
        if num_bytes > 2 * MAX_CALLS_BYTES:
            break
    return callable_tools


def _special_token_ids(view: ModelView, format: CallFormat) -> dict[str, int]:
    """Those of the format's markers that are special tokens, with their ids."""
    if view.vocabulary is None:
        return {}
    added = view.vocabulary.tokenizer.get_added_tokens_decoder()
    return {
        token.content: token_id
        for token_id, token in added.items()
        if token.special and token.content in format.markers and token_id < view.vocab_size
    }
