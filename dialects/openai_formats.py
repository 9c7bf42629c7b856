"""`response_format` of chat completions and completions: the form that an answer must have."""

from typing import Annotated, Any, Literal, Protocol

from pydantic import Field

from dialects.openai import (
    OpenAIModel,
)
from dialects.tools import (
    answer_of,
)
from domain.errors import InvalidRequest
from domain.structured_output import StructuredOutput


class JsonSchemaFormat(OpenAIModel):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(OpenAIModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")  # llama.cpp's and Together's place for it


class FormattedBody(Protocol):
    """A body whose answer may be formatted."""

    @property
    def response_format(self) -> ResponseFormat | None: ...

    @property
    def structured_output(self) -> StructuredOutput | None: ...


SCHEMA_PLACE = "response_format.json_schema.schema"


def places_of_answer(body: FormattedBody) -> dict[str, str]:
    """The body's paths for the parts of a structured output."""
    format = _format_of(body)
    if body.structured_output is not None or format is None:
        return {}
    place = SCHEMA_PLACE if format.schema_ is None else "response_format.schema"
    return {"structured_output.json_schema": place, "structured_output.json_object": "response_format"}


def wanted_answer(body: FormattedBody) -> StructuredOutput | None:
    """The required form of an output without calls; None if any text is allowed."""
    format = _format_of(body)
    if format is None:
        return body.structured_output
    if body.structured_output is not None:
        raise InvalidRequest(
            "structured_output and response_format are both set; send only one", param="response_format"
        )
    return _formatted(format)


def _format_of(body: FormattedBody) -> ResponseFormat | None:
    """The format that the body requires; None if any text is allowed."""
    format = body.response_format
    if format is None:
        return None
    if format.schema_ is not None and format.type == "text":
        raise InvalidRequest(
            "response_format.schema is set but type is 'text'; set type to json_schema, or leave out schema",
            param="response_format.schema",
        )
    if format.schema_ is not None and format.json_schema is not None:
        raise InvalidRequest(
            "response_format.schema and response_format.json_schema are both set; send only one",
            param="response_format.schema",
        )
    return None if format.type == "text" else format


def _formatted(format: ResponseFormat) -> StructuredOutput:
    if format.schema_ is not None:
        return answer_of(format.schema_, is_strict=False, place="response_format.schema")
    if format.type == "json_object":
        return StructuredOutput(json_object=True)
    if format.json_schema is None:
        raise InvalidRequest("response_format.json_schema is missing; add it", param="response_format.json_schema")
    schema = format.json_schema.schema_
    if schema is None:
        return StructuredOutput(json_object=True)
    return answer_of(schema, is_strict=format.json_schema.strict is True, place=SCHEMA_PLACE)
