"""docs/api.md lists the parameters of each body, and says of each whether it is refused."""

import re

import pytest

from api.openai.chat_schemas import ChatCompletionBody
from api.openai.completions import CompletionBody
from api.openai.embeddings import EmbeddingBody
from api.openai.response_schemas import ResponseBody
from api.openai.schemas import OpenAIModel, Unsupported
from settings import ROOT

BODIES: dict[str, type[OpenAIModel]] = {
    "Parameters of chat completions": ChatCompletionBody,
    "Parameters of completions": CompletionBody,
    "Parameters of embeddings": EmbeddingBody,
    "Parameters of responses": ResponseBody,
}


def documented(heading: str) -> dict[str, str]:
    """Parameter -> what is said of it."""
    section = (ROOT / "docs" / "api.md").read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    said: dict[str, str] = {}
    for names, text in re.findall(r"^\| (`.+?`) \| (.*) \|$", section, re.MULTILINE):
        said |= {name: text for name in re.findall(r"`(\w+)`", names)}
    return said


@pytest.mark.parametrize("heading", BODIES)
def test_every_parameter_is_documented_as_it_is(heading: str) -> None:
    body, said = BODIES[heading], documented(heading)
    assert set(said) == set(body.model_fields)
    refused = {name for name, field in body.model_fields.items() if field.metadata == list(Unsupported.__metadata__)}
    assert {name for name, text in said.items() if text == "refused"} == refused
    assert refused or body is EmbeddingBody
