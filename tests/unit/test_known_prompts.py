"""Prompts whose answers are known: each tenant finds its own, and a model keeps a bounded number of them."""

from uuid import uuid4

import pytest

from domain.catalog import ModelSpec
from tasks.known_prompts import MAX_PROMPTS, MAX_TOKENS, KnownPrompts
from text.models import ModelView, load_model_view
from text.templates import ChatTemplate, TemplateChoice

ONE, OTHER = uuid4(), uuid4()


@pytest.fixture
def view() -> ModelView:
    return load_model_view(ModelSpec(id="fake", path="fake", backend="fake", max_model_len=64))


def test_only_the_same_tenant_and_model_find_a_prompt(view: ModelView) -> None:
    known, loaded_anew = KnownPrompts(), load_model_view(view.spec)
    known.note(view, ONE, b"asked", [1, 2])
    assert known.find(view, ONE, b"asked") == [1, 2]
    assert known.find(view, OTHER, b"asked") is None
    assert known.find(view, ONE, b"asked otherwise") is None
    assert known.find(loaded_anew, ONE, b"asked") is None


def test_the_prompts_that_were_asked_for_last_are_kept(view: ModelView) -> None:
    known = KnownPrompts()
    names = [str(number).encode() for number in range(MAX_PROMPTS)]
    for name in names:
        known.note(view, ONE, name, [1])
    assert known.find(view, ONE, names[0]) == [1]
    known.note(view, ONE, b"one more", [2])
    assert known.find(view, ONE, names[0]) == [1]
    assert known.find(view, ONE, names[1]) is None


def test_a_long_prompt_is_not_kept(view: ModelView) -> None:
    known = KnownPrompts()
    known.note(view, ONE, b"long", [1] * (MAX_TOKENS + 1))
    assert known.find(view, ONE, b"long") is None


def test_a_prompt_with_a_date_in_it_is_not_kept(view: ModelView, monkeypatch: pytest.MonkeyPatch) -> None:
    known = KnownPrompts()
    template = ChatTemplate("{{ strftime_now('%d') }} {{ messages[0].content }}", {})
    monkeypatch.setattr(view, "_chat_template", TemplateChoice(view.spec, {"default": template}))
    known.note(view, ONE, b"asked", [1])
    assert known.find(view, ONE, b"asked") is None
