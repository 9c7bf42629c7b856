"""Message Batches through the unmodified `anthropic` SDK. Maintenance is stepped by hand, and a hand does the worker's
part; tests/integration/test_batches_end_to_end.py has the real processes."""

from collections.abc import Iterator
from typing import Any

import anthropic
import pytest

from maintenance.batches import BatchWork
from tests.conformance.anthropic_stack import HI, Stack, stack

__all__ = ["stack"]


@pytest.fixture
def work(stack: Stack) -> Iterator[BatchWork]:
    services = stack.server.services
    work = BatchWork(stack.worker.sessions, services.views, services.settings)
    yield work
    work.close()


def asked(number: int, **params: Any) -> Any:
    return {"custom_id": f"message-{number}", "params": {"model": "fake", "max_tokens": 8, "messages": HI} | params}


def results_of(stack: Stack, batch_id: str) -> dict[str, Any]:
    return {one.custom_id: one.result for one in stack.client.messages.batches.results(batch_id)}


def test_a_batch_runs_to_its_results(stack: Stack, work: BatchWork) -> None:
    batches = stack.client.messages.batches
    hints: Any = {"system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]}
    created = batches.create(requests=[asked(1, **hints), asked(2), asked(3, max_tokens=1_000)])
    assert created.id.startswith("msgbatch_")
    assert (created.processing_status, created.results_url, created.ended_at) == ("in_progress", None, None)
    assert created.request_counts.to_dict() == dict.fromkeys(("succeeded", "errored", "canceled", "expired"), 0) | {
        "processing": 3
    }
    with pytest.raises(anthropic.AnthropicError):
        list(batches.results(created.id))
    work.tick()
    for text in ("One", "Two"):
        stack.is_asking = True
        stack.answer_next(text)
    work.tick()
    ended = batches.retrieve(created.id)
    assert (ended.processing_status, ended.ended_at is None) == ("ended", False)
    counts = ended.request_counts
    assert (counts.processing, counts.succeeded, counts.errored, counts.canceled, counts.expired) == (0, 2, 1, 0, 0)
    results = results_of(stack, created.id)
    succeeded = [results["message-1"], results["message-2"]]
    assert {result.message.content[0].text for result in succeeded} == {"One", "Two"}
    assert all(result.message.usage.service_tier == "batch" for result in succeeded)
    assert results["message-3"].type == "errored"
    error = results["message-3"].error
    assert (error.type, error.error.type) == ("error", "invalid_request_error")
    assert "max_tokens" in error.error.message
    assert stack.http.get(f"/v1/batches/{created.id.replace('msgbatch', 'batch')}").json()["status"] == "completed"
    assert batches.delete(created.id).type == "message_batch_deleted"
    with pytest.raises(anthropic.NotFoundError):
        batches.retrieve(created.id)


@pytest.mark.parametrize("is_begun", [False, True])
def test_a_batch_that_is_cancelled_has_a_result_for_each_request(stack: Stack, work: BatchWork, is_begun: bool) -> None:
    batches = stack.client.messages.batches
    created = batches.create(requests=[asked(1), asked(2)])
    with pytest.raises(anthropic.BadRequestError, match="has not ended"):
        batches.delete(created.id)
    if is_begun:
        work.tick()
    cancelled = batches.cancel(created.id)
    assert (cancelled.processing_status, cancelled.cancel_initiated_at is None) == ("canceling", False)
    work.tick()  # the jobs are asked to stop
    work.tick()
    ended = batches.cancel(created.id)
    assert (ended.processing_status, ended.request_counts.canceled) == ("ended", 2)
    assert {name: result.type for name, result in results_of(stack, created.id).items()} == {
        "message-1": "canceled",
        "message-2": "canceled",
    }


def test_batches_are_listed_page_by_page_in_both_directions(stack: Stack, work: BatchWork) -> None:
    batches = stack.client.messages.batches
    known = [batch.id for batch in batches.list()]
    ids = [batches.create(requests=[asked(number)]).id for number in range(3)]
    assert [batch.id for batch in batches.list(limit=1)] == ids[::-1] + known
    back = batches.list(limit=1, before_id=ids[0])
    assert ([batch.id for batch in back.data], back.has_more) == ([ids[1]], True)
    for id_ in ids:
        batches.cancel(id_)
    work.tick()


def test_a_repeated_request_finds_its_batch(stack: Stack, work: BatchWork) -> None:
    batches = stack.client.messages.batches
    requests = [asked(1, system="of this test alone")]
    first = batches.create(requests=requests)
    again = batches.create(requests=requests, extra_headers={"x-stainless-retry-count": "1"})
    assert again.id == first.id
    assert batches.create(requests=requests).id != first.id
    for batch in batches.list():
        batches.cancel(batch.id)
    work.tick()


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([], "requests"),
        ([asked(1), asked(1)], "requests.1.custom_id"),
        ([asked(1), asked(2, model="large")], "requests.1.params.model"),
        ([asked(1), asked(2, max_tokens=0)], "requests.1.params: max_tokens"),
        ([asked(1, stream=True)], "stream"),
        ([asked(1, messages=[{"role": "user", "content": [{"type": "image"}]}])], "messages.0.content.0.type"),
    ],
)
def test_a_batch_with_a_request_that_cannot_be_is_refused(stack: Stack, requests: Any, message: str) -> None:
    with pytest.raises(anthropic.BadRequestError) as refusal:
        stack.client.messages.batches.create(requests=requests)
    assert message in str(refusal.value.api_message)
