"""Shared by the bodies of the OpenAI routes: strictness, sampling parameters, timeouts, and building domain objects.

A body declares only types; the limits are those of `domain.requests`, to which every body is converted.
"""

from collections.abc import Mapping
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
from domain.requests import MAX_STOP_STRINGS, Effort, SamplingParams
from domain.structured_output import (
    StructuredOutput,
)
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
