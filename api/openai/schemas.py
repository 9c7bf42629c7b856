"""What the bodies of the OpenAI routes share: strictness, sampling parameters, and fields that are refused by name.

A body declares types only; the bounds are those of `domain.requests`, in which every body ends.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

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

from api.bodies import UNSUPPORTED, invalid_request
from api.ignored_fields import note_ignored
from api.job_schemas import MetadataKey, MetadataValue
from api.openai.hints import FOREIGN_TOOLS, is_foreign_tool
from domain.chunks import TokenLogprob
from domain.errors import CeleriacError, InvalidRequest, UnsupportedParameter
from domain.first_error import FirstErrorModel
from domain.jobs import FinishReason
from domain.requests import MAX_STOP_STRINGS, SamplingParams
from domain.structured_output import StructuredOutput
from tasks.models import ModelView

#: The reasons that clients know. A job that was cut off otherwise ends in an error.
FINISH_REASONS = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}

PRIORITY_BY_SERVICE_TIER = {"auto": 0, "default": 0, "flex": -5, "priority": 5, "fast": 5}

Domain = TypeVar("Domain", bound=BaseModel)


class OpenAIModel(FirstErrorModel):
    """Part of a body: a field that nobody knows is refused; null is as good as nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


def refuse(reason: str) -> PydanticCustomError:
    return PydanticCustomError(UNSUPPORTED, "{reason}", {"reason": reason})


def _refuse_any(value: Any) -> None:
    """What is empty asks for nothing."""
    if value is not None and value not in ("", [], {}):
        raise refuse("is not supported here; leave it out")


def only(*harmless: Any) -> AfterValidator:
    """A field whose `harmless` values change nothing, and whose other values are not supported."""

    def check(value: Any) -> Any:
        if value is not None and value not in harmless:
            shown = " or ".join(repr(one) for one in harmless)
            raise refuse(f"is supported as {shown} only; leave it out")
        return value

    return AfterValidator(check)


Unsupported = Annotated[Any, AfterValidator(_refuse_any)]

MAX_PARTS = 1024  # of one message's content


class ForeignTool(OpenAIModel):
    """A tool that is no function. It keeps its place among the tools, and nothing else."""

    model_config = ConfigDict(extra="ignore")

    type: Annotated[str, Field(json_schema_extra={"enum": sorted(FOREIGN_TOOLS)})]


def tag_of_tool(tool: object) -> str:
    return "<foreign>" if isinstance(tool, ForeignTool) or is_foreign_tool(tool) else "<function>"


#: One stop string, or several. The tags keep the two branches out of error messages.
Strings = Annotated[
    Annotated[str, Tag("<string>")] | Annotated[list[str], Field(max_length=MAX_STOP_STRINGS), Tag("<strings>")],
    Discriminator(lambda value: "<string>" if isinstance(value, str) else "<strings>"),
]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Metadata = Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)]
CallerId = Annotated[str, StringConstraints(max_length=512)]
ServiceTier = Literal["auto", "default", "flex", "priority", "fast"]


#: What a client sent, shown in quotation marks (an apostrophe opens none); or a word, such as the path of a field.
_QUOTED_OR_NAME = re.compile(r"""((?<!\w)'(?:[^'\\]|\\.)*'(?!\w)|"(?:[^"\\]|\\.)*")|(\w+(?:\.\w+)*)""")


def publish_bounds(schema: dict[str, Any]) -> None:
    """Add to the schema of a body the bounds of its sampling parameters; numbers of its own go before."""
    for name, bounded in SamplingParams.model_json_schema()["properties"].items():
        bounds_by_type = {branch.get("type"): branch for branch in bounded.get("anyOf", [bounded])}
        for branch in schema["properties"].get(name, {}).get("anyOf", ()):
            bounds = bounds_by_type.get(branch.get("type"), {})
            known = {"title", "default", *branch} - {"items", "additionalProperties"}
            branch |= {key: bound for key, bound in bounds.items() if key not in known}


class GenerationBody(OpenAIModel):
    """The parameters of every route that generates text, and the extensions that arrive through `extra_body`."""

    model_config = ConfigDict(json_schema_extra=publish_bounds)

    model: Annotated[str, StringConstraints(min_length=1, max_length=256)]
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    stream: bool | None = None

    # Who asks; nothing here depends on it.
    user: CallerId | None = None
    safety_identifier: CallerId | None = None
    prompt_cache_key: CallerId | None = None

    service_tier: ServiceTier | None = None
    metadata: Metadata | None = None

    # Extensions
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    bad_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    structured_output: StructuredOutput | None = None

    def sampling(self, **given: Any) -> SamplingParams:
        """The parameters of this body, and `given` ones that it spells otherwise. None leaves the default. Raises
        InvalidRequest, with the names of SamplingParams."""
        fields = {name: getattr(self, name, None) for name in SamplingParams.model_fields}
        return build(SamplingParams, fields | given)


class StreamOptions(OpenAIModel):
    include_usage: bool | None = None


def refuse_idle_stream_options(body: GenerationBody) -> None:
    """As OpenAI's does. Raises InvalidRequest."""
    if getattr(body, "stream_options", None) is not None and not body.stream:
        raise InvalidRequest(
            "stream_options is given, but stream is not true; set it, or leave stream_options out",
            param="stream_options",
        )


def take_effort(effort: Effort | None, view: ModelView, *, place: str) -> None:
    """One that never thinks answers without, whatever effort it is told: that is a hint, which is noted. How long
    another thinks is its chat template's matter. Raises UnsupportedParameter."""
    if effort is None:
        return
    if view.output_format.reasoning is None:
        note_ignored([place])
        return
    raise UnsupportedParameter(
        f"{place} is {effort!r}, but {view.spec.id} thinks as its chat template says; leave it out", param=place
    )


def build(model: type[Domain], fields: dict[str, Any]) -> Domain:
    """A domain object from those `fields` that are given. Raises InvalidRequest."""
    try:
        return model.model_validate({name: value for name, value in fields.items() if value is not None})
    except ValidationError as exc:
        raise invalid_request(exc, model) from None


def build_at(place: str, model: type[Domain], fields: dict[str, Any]) -> Domain:
    """As `build`, for a part of the body: the refusal names the whole path."""
    try:
        return build(model, fields)
    except InvalidRequest as exc:
        exc.message = f"{place}: {exc.message}"
        exc.param = f"{place}.{exc.param}" if exc.param else place
        raise


def spelling_of_params(**names: str) -> dict[str, str]:
    """What a body that generates text calls the fields of our requests; `names` are those that it spells otherwise."""
    return names | {"prompt_token_ids": "prompt"}


def with_body_names(exc: CeleriacError, spelling: Mapping[str, str]) -> CeleriacError:
    """The same refusal with the names of the body for those of our own request. What stands in quotation marks is the
    client's own, and stays as it is."""
    exc.message = _QUOTED_OR_NAME.sub(lambda found: found[1] or _spelt(found[2], spelling), exc.message)
    exc.param = exc.param and _spelt(exc.param, spelling)
    return exc


def _spelt(path: str, spelling: Mapping[str, str]) -> str:
    """The longest beginning of a path that has another name gets it."""
    path = path.removeprefix("params.")
    for length in range(path.count(".") + 1, 0, -1):
        steps = path.split(".")
        ours, rest = ".".join(steps[:length]), steps[length:]
        if ours in spelling:
            return ".".join([spelling[ours], *rest])
    return path


def strings(value: str | list[str] | None) -> list[str] | None:
    return [value] if isinstance(value, str) else value


def tier_of(asked: str | None, priority: int) -> str:
    """The tier that was used; only who asked for one by the name of `fast` is answered so."""
    if asked == "fast":
        return "fast"
    return "priority" if priority > 0 else "flex" if priority < 0 else "default"


def content_logprobs(logprobs: Sequence[TokenLogprob]) -> list[dict[str, object]]:
    """`logprobs.content`, the tokens of the content: the one that ends it has no text and is none of them."""
    return [_logprob_object(logprob) for logprob in logprobs if logprob.bytes]


def _logprob_object(logprob: TokenLogprob) -> dict[str, object]:
    top = [
        _token_object(text, value, utf8) for (_, text, value), utf8 in zip(logprob.top, logprob.top_bytes, strict=True)
    ]
    return _token_object(logprob.token, logprob.logprob, logprob.bytes) | {"top_logprobs": top}


def _token_object(text: str, logprob: float, utf8: Sequence[int]) -> dict[str, object]:
    return {"token": text, "logprob": logprob, "bytes": list(utf8)}
