"""What an output must look like: a JSON schema, a regular expression, one of some strings, or a grammar."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, StringConstraints, field_validator, model_validator

from domain.jobs import Frozen
from domain.schema_bounds import MAX_PATTERN_CHARS, check_numbers, check_regex, check_repetitions, check_schema
from domain.tools import ToolCalls

MAX_LARK_BYTES = 16_384
MAX_OUTPUT_CHOICES = 1_024

OutputChoice = Annotated[str, StringConstraints(min_length=1, max_length=1_024)]


class StructuredOutput(Frozen):
    """Exactly one field is given, and the whole output follows it: nothing before it, nothing behind it. Beside `calls`
    there may be another: the output is then calls, or what the other field says.

    `regex` and the schema's patterns are of the Rust regex crate's dialect, without look-around and back-references;
    `regex` matches the whole output. `lark` is llguidance's variant of Lark, with the rule `start`. The JSON of
    `json_schema` is written without whitespace, its properties in the schema's order.
    """

    json_schema: dict[str, Any] | None = None
    regex: str | None = Field(default=None, min_length=1, max_length=MAX_PATTERN_CHARS)
    choices: tuple[OutputChoice, ...] | None = Field(default=None, min_length=1, max_length=MAX_OUTPUT_CHOICES)
    lark: str | None = Field(default=None, min_length=1, max_length=MAX_LARK_BYTES)
    json_object: Literal[True] | None = None
    calls: ToolCalls | None = None

    @property
    def kind(self) -> str:
        """The name of the field that is given; beside calls, of the other."""
        return next(name for name in type(self).model_fields if getattr(self, name) is not None)

    @field_validator("json_schema")
    @classmethod
    def _bounded_schema(cls, schema: dict[str, Any] | None) -> dict[str, Any] | None:
        if schema is not None:
            check_schema(schema)
            check_numbers(schema)
        return schema

    @field_validator("regex")
    @classmethod
    def _bounded_regex(cls, regex: str | None) -> str | None:
        if regex is not None:
            check_regex(regex, "the regular expression")
        return regex

    @field_validator("lark")
    @classmethod
    def _bounded_lark(cls, lark: str | None) -> str | None:
        if lark is None:
            return None
        num_bytes = len(lark.encode())
        if num_bytes > MAX_LARK_BYTES:
            raise ValueError(f"the grammar has {num_bytes} bytes; at most {MAX_LARK_BYTES} are taken: shorten it")
        check_repetitions(lark, "the grammar")
        return lark

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) - (self.calls is not None) > 1 or not given:
            known = ", ".join(name for name in type(self).model_fields if name != "calls")
            raise ValueError(f"{' and '.join(given) or 'nothing'} is given; give exactly one of {known}")
        return self
