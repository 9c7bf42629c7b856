"""Requests whose answers are known: each tenant finds its own, and a model keeps a bounded number of them."""

import asyncio
from typing import Any
from uuid import UUID, uuid4

import pytest

from domain.catalog import ModelSpec
from domain.job_options import JobOptions
from domain.jobs import new_id
from domain.requests import GenerationRequest, SamplingParams
from storage.job_accept import NewJob
from tasks import known_requests
from tasks.known_requests import MAX_BYTES, MAX_REQUESTS, MAX_TOKENS, KnownRequests, ReadyJob
from text.models import ModelView, load_model_view
from text.templates import ChatTemplate, TemplateChoice

ONE, OTHER = uuid4(), uuid4()


@pytest.fixture
def view() -> ModelView:
    return load_model_view(ModelSpec(id="fake", path="fake", backend="fake", max_model_len=64))


class Known(KnownRequests):
    """With what all of these tests say of a request."""

    def note_answered(
        self,
        view: ModelView,
        *token_ids: int,
        name: bytes = b"asked",
        tenant_id: UUID = ONE,
        temperature: float = 0.0,
        **params: Any,
    ) -> GenerationRequest:
        """A request whose answer was known."""
        sampling = SamplingParams(temperature=temperature, **params)
        request = GenerationRequest(model="fake", prompt="a", params=sampling)
        new_job = NewJob(
            id=new_id(),
            tenant_id=tenant_id,
            request=request.model_copy(),
            prompt_token_ids=token_ids,
            model_revision="1",
            max_tokens=8,
            seed=7,
            max_failures=3,
            result_ttl_seconds=60,
            request_hash=name,
        )
        for _ in range(2):  # the second time it is known to come again
            self.note(ReadyJob(new_job, request, view), JobOptions())
        return request

    def ids_of(self, view: ModelView, name: bytes = b"asked", tenant_id: UUID = ONE) -> list[int] | None:
        found = self.find(view, tenant_id, (name, None))
        return None if found is None else found.prepared.prompt_token_ids


async def test_only_the_same_tenant_and_model_find_a_request(view: ModelView) -> None:
    known, loaded_anew = Known(), load_model_view(view.spec)
    known.note_answered(view, 1, 2)
    assert known.ids_of(view) == [1, 2]
    assert known.ids_of(view, tenant_id=OTHER) is None
    assert known.ids_of(view, b"asked otherwise") is None
    assert known.find(view, ONE, (b"asked", True)) is None
    assert known.ids_of(loaded_anew) is None


async def test_the_very_request_is_found_without_its_hash_as_long_as_somebody_has_it(view: ModelView) -> None:
    known, loaded_anew = Known(), load_model_view(view.spec)
    request = known.note_answered(view, 1, 2)
    found = known.find_again(view, request, JobOptions(idempotency_key="any"))
    assert found is not None
    assert (found.asked, found.ready.prepared.prompt_token_ids) == (b"asked", [1, 2])
    assert known.find_again(loaded_anew, request, JobOptions()) is None
    assert known.find_again(view, request, JobOptions(priority=1)) is None
    assert known.find_again(view, request.model_copy(), JobOptions()) is None
    random = known.note_answered(view, 1, name=b"random", temperature=1.0)
    assert known.find_again(view, random, JobOptions()) is None
    assert len(known._again) == 1
    del request
    assert not known._again


async def test_what_was_drawn_for_a_request_is_drawn_anew(view: ModelView) -> None:
    known = Known()
    known.note_answered(view, 1, name=b"greedy")
    known.note_answered(view, 1, name=b"random", temperature=1.0)
    greedy, random = (known.find(view, ONE, (name, None)) for name in (b"greedy", b"random"))
    assert greedy is not None
    assert random is not None
    assert (greedy.is_same_again, random.is_same_again) == (True, False)


async def test_a_tenant_that_asks_too_much_forgets_of_its_own(view: ModelView) -> None:
    known = Known()
    known.note_answered(view, 1, tenant_id=OTHER)
    names = [str(number).encode() for number in range(MAX_REQUESTS + 1)]
    for name in names:
        known.note_answered(view, 1, name=name)
    assert known.ids_of(view, names[1]) is None
    assert known.ids_of(view, names[2]) == [1]
    assert known.ids_of(view, tenant_id=OTHER) == [1]


async def test_a_long_request_is_not_kept(view: ModelView) -> None:
    known = Known()
    request = known.note_answered(view, 1, allowed_token_ids=list(range(10_000, 10_000 + MAX_BYTES // 6)))
    assert known.ids_of(view) is None
    assert known.find_again(view, request, JobOptions()) is None


async def test_a_long_prompt_is_not_kept(view: ModelView) -> None:
    known = Known()
    known.note_answered(view, *[1] * (MAX_TOKENS + 1))
    assert known.ids_of(view) is None


async def test_a_prompt_with_a_date_in_it_is_not_kept(view: ModelView, monkeypatch: pytest.MonkeyPatch) -> None:
    known = Known()
    template = ChatTemplate("{{ strftime_now('%d') }} {{ messages[0].content }}", {})
    monkeypatch.setattr(view, "_chat_template", TemplateChoice(view.spec, {"default": template}))
    known.note_answered(view, 1)
    assert known.ids_of(view) is None


async def test_all_are_forgotten_after_a_while(view: ModelView, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_requests, "KEEP_SECONDS", 0.0)
    known = Known()
    for _ in range(2):
        known.note_answered(view, 1)
        assert known.ids_of(view) == [1]
        await asyncio.sleep(0.01)
        assert known.ids_of(view) is None
