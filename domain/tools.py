"""Functions that a model may ask its client to call: what is offered, and what was asked for."""

from typing import Annotated, Any

from pydantic import Field, StringConstraints

from domain.jobs import Frozen

MAX_TOOLS = 128
MAX_TOOL_CHARS = 100_000

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
