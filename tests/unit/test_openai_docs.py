"""docs/api.md lists the parameters of each body, and says of each whether it is refused."""

import json
import re

import pytest

from dialects.bodies import owner_at
from dialects.fields import HINTS, Hints
from dialects.openai import OpenAIModel, Unsupported
from dialects.openai_chat import ChatCompletionBody
from dialects.openai_completions import CompletionBody
from dialects.openai_embeddings import EmbeddingBody
from dialects.openai_response_requests import ResponseBody
from settings import ROOT

BODIES: dict[str, type[OpenAIModel]] = {
    "Parameters of chat completions": ChatCompletionBody,
    "Parameters of completions": CompletionBody,
    "Parameters of embeddings": EmbeddingBody,
    "Parameters of responses": ResponseBody,
}


def documented(heading: str, page: str = "api.md") -> dict[str, str]:
    """Parameter -> what is said of it."""
    section = (ROOT / "docs" / page).read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
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


def hint_rows(hints: Hints) -> list[str]:
    """The table of the hints: what has one reason in the same places is one row."""
    parents_by_field: dict[tuple[str, str], list[str]] = {}
    for place, hint in hints.items():
        parent, _, name = place.rpartition(".")
        values = " or ".join(json.dumps(value) for value in hint.values)
        field = f"`{name}`" + (f" ({values})" if values else "")
        parents_by_field.setdefault((field, hint.reason), []).append(f"`{parent}`" if parent else "the body")
    fields_by_row: dict[tuple[str, str], list[str]] = {}
    for (field, reason), parents in parents_by_field.items():
        fields_by_row.setdefault((", ".join(parents), reason), []).append(field)
    return [f"| {', '.join(fields)} | {parents} | {reason} |" for (parents, reason), fields in fields_by_row.items()]


def test_every_hint_is_documented_with_its_reason() -> None:
    section = (ROOT / "docs" / "api.md").read_text().split("## Fields that are taken and named\n")[1].split("\n## ")[0]
    assert [line for line in section.splitlines() if line.startswith("| ")][1:] == hint_rows(HINTS)


def test_no_hint_takes_away_what_a_part_of_a_body_reads() -> None:
    """At the top of a body its own fields go first."""
    for place in HINTS:
        *outer, last = place.split(".")
        for body in BODIES.values():
            owner = owner_at(body, [0 if step == "*" else step for step in outer]) if outer else None
            assert owner is None or last == "*" or last not in owner.model_fields, (place, owner)
