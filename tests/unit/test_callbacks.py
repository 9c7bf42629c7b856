"""Celery callbacks: what a client may have sent, and where to."""

from typing import Any

import pytest
from pydantic import ValidationError

from dialects.native import JobBody
from domain.callbacks import MAX_CALLBACK_BYTES, TASK_NAME, CeleryCallback, refusal_of_queue


def callback(**fields: Any) -> CeleryCallback:
    return CeleryCallback.model_validate({"queue": "celery", "headers": {"id": "t1"}} | fields)


def test_only_the_one_task_is_run_whatever_the_headers_say() -> None:
    sent = callback(
        headers={"id": "t1", "task": "os.system", "lang": "sh"}, kwargs={"output": "text", "job_id": "job_2"}
    )
    body, headers = sent.message("job_1")
    assert (headers["task"], headers["lang"], headers["id"]) == (TASK_NAME, "py", "t1")
    assert body[:2] == [[], {"output": "text", "job_id": "job_1"}]
    assert set(body[2]) == {"callbacks", "errbacks", "chain", "chord"}


@pytest.mark.parametrize(
    "fields",
    [
        {"headers": {}},
        {"headers": {"id": 7}},
        {"queue": "_kombu.binding"},
        {"queue": "a b"},
        {"embed": {"chain": ["x" * MAX_CALLBACK_BYTES]}},
    ],
)
def test_what_cannot_be_sent_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        callback(**fields)


@pytest.mark.parametrize(
    ("queue", "is_allowed"),
    [("celery", True), ("text-1", True), ("other", False), ("celeriac.fake", False), ("unacked", False)],
)
def test_callbacks_go_only_to_allowed_queues_and_never_to_ours(queue: str, is_allowed: bool) -> None:
    assert (refusal_of_queue(queue, ["celery", "text-*"]) is None) is is_allowed
    assert (refusal_of_queue(queue, ["*"]) is None) is not queue.startswith(("celeriac.", "unacked"))


def test_a_job_tells_one_receiver() -> None:
    body = {"model": "m", "prompt": "a", "webhook": "https://you.example", "celery": callback().model_dump()}
    with pytest.raises(ValidationError, match="webhook and celery are both set"):
        JobBody.model_validate(body)
