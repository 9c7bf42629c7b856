"""Functions that a model may ask its client to call: what is offered, and what was asked for."""

import json
from enum import StrEnum
from typing import Annotated, Any, Self

from pydantic import Field, StringConstraints, model_validator

from domain.jobs import Frozen
from domain.schema_bounds import check_numbers, check_patterns

MAX_TOOLS = 128
MAX_TOOL_CHARS = 100_000
MAX_CALLS_BYTES = 65_536  # of all schemas that a grammar of calls is made of

ToolName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]


class ToolDefinition(Frozen):
    """`parameters` is the JSON schema of the arguments, an object; without one, there are none."""

    name: ToolName
    description: str | None = Field(default=None, max_length=MAX_TOOL_CHARS)
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolCall(Frozen):
    """`arguments` is JSON as the model wrote it, so not always valid."""

    id: str = Field(min_length=1, max_length=128)
    name: ToolName
    arguments: str = Field(max_length=MAX_TOOL_CHARS)


class ToolFormat(StrEnum):
    """How a model writes calls; see `tasks/output_formats.py`."""

    HERMES = "hermes"
    MISTRAL = "mistral"
    LLAMA3 = "llama3"


class CallableTool(Frozen):
    """`arguments` is the JSON schema that a call's arguments are held to, as it is to be compiled."""

    name: ToolName
    arguments: dict[str, Any]


class ToolCalls(Frozen):
    """Calls that an output may consist of: of any of these tools, one after the other, or a single one.

    `marker_token_id` is a special token that the model may write before its calls.
    """

    format: ToolFormat
    tools: tuple[CallableTool, ...] = Field(min_length=1, max_length=MAX_TOOLS)
    is_single: bool = False
    marker_token_id: int | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _bounded_schemas(self) -> Self:
        num_bytes = 0
        for tool in self.tools:
            check_numbers(tool.arguments)
            check_patterns(tool.arguments)
            num_bytes += len(json.dumps(tool.arguments, separators=(",", ":"), ensure_ascii=False).encode())
        if num_bytes > MAX_CALLS_BYTES:
            raise ValueError(
                f"the tools' parameters have more than {MAX_CALLS_BYTES} bytes without their descriptions, and so many "
                "are taken where calls follow a grammar: send fewer tools"
            )
        return self
