"""The tools of a response's body, and which of them the model may call."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from dialects.openai import ForeignTool, OpenAIModel, only, tag_of_tool, tag_of_tool_choice
from domain.structured_output import MAX_TOOLS


class ResponseFunctionTool(OpenAIModel):
    type: Annotated[str, only("function")]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


ResponseTool = Annotated[
    Annotated[ResponseFunctionTool, Tag("<function>")] | Annotated[ForeignTool, Tag("<foreign>")],
    Discriminator(tag_of_tool),
]


class ResponseNamedTool(OpenAIModel):
    type: Annotated[str, only("function")]
    name: str


class ResponseAllowedTools(OpenAIModel):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[ResponseNamedTool], Field(max_length=MAX_TOOLS)]


ResponseToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<mode>")]
    | Annotated[ResponseNamedTool, Tag("<named>")]
    | Annotated[ResponseAllowedTools, Tag("<allowed>")],
    Discriminator(tag_of_tool_choice),
]


def mode_of(choice: ResponseToolChoice | None) -> Literal["none", "auto", "required", "named"]:
    if isinstance(choice, ResponseAllowedTools):
        return choice.mode
    return "named" if isinstance(choice, ResponseNamedTool) else choice or "auto"
