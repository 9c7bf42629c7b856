"""Requests whose answers are known: each tenant finds its own, and a model keeps a bounded number of them."""

import asyncio
from typing import Any
from uuid import UUID, uuid4

import pytest

from domain.catalog import ModelSpec
from domain.jobs import new_id
from domain.requests import GenerationRequest, SamplingParams
from storage.job_accept import NewJob
from tasks import known_requests
from tasks.known_requests import MAX_BYTES, MAX_REQUESTS, MAX_TOKENS, Asked, KnownRequests
from text.models import ModelView, load_model_view
from text.templates import ChatTemplate, TemplateChoice

ONE, OTHER = uuid4(), uuid4()


@pytest.fixture
def view() -> ModelView:
    return load_model_view(ModelSpec(id="fake", path="fake", backend="fake", max_model_len=64))


def asked(name: bytes = b"asked", tenant_id: UUID = ONE, *, use_cache: bool | None = None) -> Asked:
    return tenant_id, name, use_cache


def answered(*token_ids: int, temperature: float = 0.0, **params: Any) -> NewJob:
    return NewJob(
        id=new_id(),
        tenant_id=ONE,
        request=GenerationRequest(model="fake", prompt="a", params=SamplingParams(temperature=temperature, **params)),
        prompt_token_ids=token_ids,
        model_revision="1",
        max_tokens=8,
        seed=7,
        max_failures=3,
        result_ttl_seconds=60,
        request_hash=b"asked",
    )


def ids_of(known: KnownRequests, view: ModelView, one: Asked) -> list[int] | None:
    found = known.find(view, one)
    return None if found is None else found.prepared.prompt_token_ids


async def test_only_the_same_tenant_and_model_find_a_request(view: ModelView) -> None:
    known, loaded_anew = KnownRequests(), load_model_view(view.spec)
    known.note(view, asked(), answered(1, 2))
    assert ids_of(known, view, asked()) == [1, 2]
    assert known.find(view, asked(tenant_id=OTHER)) is None
    assert known.find(view, asked(b"asked otherwise")) is None
    assert known.find(view, asked(use_cache=True)) is None
    assert known.find(loaded_anew, asked()) is None


async def test_what_was_drawn_for_a_request_is_drawn_anew(view: ModelView) -> None:
    known = KnownRequests()
    known.note(view, asked(b"greedy"), answered(1))
    known.note(view, asked(b"random"), answered(1, temperature=1.0))
    greedy, random = (known.find(view, asked(name)) for name in (b"greedy", b"random"))
    assert greedy is not None
    assert random is not None
    assert (greedy.is_same_again, random.is_same_again) == (True, False)


async def test_the_requests_that_were_sent_last_are_kept(view: ModelView) -> None:
    known = KnownRequests()
    names = [str(number).encode() for number in range(MAX_REQUESTS)]
    for name in names:
        known.note(view, asked(name), answered(1))
    assert ids_of(known, view, asked(names[0])) == [1]
    known.note(view, asked(b"one more"), answered(2))
    assert ids_of(known, view, asked(names[0])) == [1]
    assert known.find(view, asked(names[1])) is None


async def test_a_long_request_is_not_kept(view: ModelView) -> None:
    known = KnownRequests()
    known.note(view, asked(), answered(1, allowed_token_ids=list(range(10_000, 10_000 + MAX_BYTES // 6))))
    assert known.find(view, asked()) is None


async def test_a_long_prompt_is_not_kept(view: ModelView) -> None:
    known = KnownRequests()
    known.note(view, asked(), answered(*[1] * (MAX_TOKENS + 1)))
    assert known.find(view, asked()) is None


async def test_a_prompt_with_a_date_in_it_is_not_kept(view: ModelView, monkeypatch: pytest.MonkeyPatch) -> None:
    known = KnownRequests()
    template = ChatTemplate("{{ strftime_now('%d') }} {{ messages[0].content }}", {})
    monkeypatch.setattr(view, "_chat_template", TemplateChoice(view.spec, {"default": template}))
    known.note(view, asked(), answered(1))
    assert known.find(view, asked()) is None


async def test_all_are_forgotten_after_a_while(view: ModelView, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_requests, "KEEP_SECONDS", 0.0)
    known = KnownRequests()
    for _ in range(2):
        known.note(view, asked(), answered(1))
        assert ids_of(known, view, asked()) == [1]
        await asyncio.sleep(0.01)
        assert known.find(view, asked()) is None
