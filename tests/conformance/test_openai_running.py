"""A completion as a job: retries attach, keys replay, clients leave, waits are kept alive, ends are told."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import UUID

import httpx
import openai
import pytest
from sqlalchemy import update

from domain.jobs import JobError, JobStatus, external_id, parse_id
from domain.requests import GenerationRequest
from storage import job_queries
from storage.tables import DEFAULT_TENANT_ID, Tenant
from tests.conformance.harness import MESSAGES, Served, chat_body, frames_of
from tests.integration.api_harness import HandWorker
from tests.waiting import wait_until

RETRY = {"x-stainless-retry-count": "1", "x-stainless-read-timeout": "600"}


def post(served: Served, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
    return httpx.post(f"{served.server.url}/v1/chat/completions", json=chat_body(**fields), headers=headers, timeout=30)


def newest_job(served: Served) -> UUID:
    with served.rig.sessions() as session:
        [job] = job_queries.list_jobs(session, DEFAULT_TENANT_ID, limit=1)
    return job.id


def num_jobs(served: Served) -> int:
    with served.rig.sessions() as session:
        return len(job_queries.list_jobs(session, DEFAULT_TENANT_ID, limit=100))


def test_t13_every_answer_names_its_request_and_its_job(served: Served) -> None:
    whole, streamed, refused = post(served), post(served, stream=True), post(served, n=0)
    for answer in (whole, streamed):
        assert answer.headers["x-request-id"].startswith("req_")
        assert answer.headers["x-job-id"].startswith("job_")
        assert answer.headers["openai-version"] == "2020-10-01"
        assert int(answer.headers["openai-processing-ms"]) >= 0
        assert "x-ratelimit-limit-requests" not in answer.headers, "there is no such limit"
    assert refused.status_code == 400
    assert refused.headers["x-request-id"].startswith("req_")


def test_an_idempotency_key_replays_what_is_done_and_refuses_another_request(served: Served) -> None:
    key = {"Idempotency-Key": "once"}
    first, second = post(served, key), post(served, key)
    assert second.json() == first.json()
    assert second.headers["idempotent-replayed"] == "true"
    frames = frames_of(post(served, key, stream=True))
    text = "".join(frame["choices"][0]["delta"].get("content", "") for frame in frames[:-1])
    assert text == first.json()["choices"][0]["message"]["content"]
    other = post(served, key, seed=5)
    assert other.status_code == 422
    assert other.json()["error"]["code"] == "idempotency_key_reused"
    assert num_jobs(served) == 1


def test_t10_a_retry_of_an_undelivered_request_attaches_and_a_delivered_one_runs_anew(served: Served) -> None:
    leave(served, is_streamed=False, num_tokens=100)
    again = post(served, RETRY, max_completion_tokens=100)
    assert again.headers["x-retry-attached"] == "true"
    assert again.json()["usage"]["completion_tokens"] == 100
    assert num_jobs(served) == 1
    wait_until(lambda: served.rig.job(parse_id(again.headers["x-job-id"])).delivered_at)
    deliberate = post(served, RETRY, max_completion_tokens=100)
    assert "x-retry-attached" not in deliberate.headers
    assert num_jobs(served) == 2


def test_two_calls_that_are_meant_are_two_jobs(served: Served) -> None:
    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(lambda _: post(served, {"x-stainless-retry-count": "0"}), range(2))
    assert first.headers["x-job-id"] != second.headers["x-job-id"]


@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_job_whose_only_client_left_is_cancelled(served: Served, is_streamed: bool) -> None:
    leave(served, is_streamed=is_streamed)
    job_id = newest_job(served)
    wait_until(lambda: served.rig.job(job_id).status is JobStatus.CANCELLED)
    assert served.rig.job(job_id).num_committed_tokens < 3000


def test_a_job_that_shall_go_on_goes_on(served: Served) -> None:
    for number, headers in enumerate(({"X-On-Disconnect": "continue"}, {}), start=1):
        leave(served, is_streamed=True, headers=headers, num_tokens=200, store=number == 2)
        job_id = newest_job(served)
        wait_until(lambda job_id=job_id: served.rig.job(job_id).status.is_terminal)  # type: ignore[misc]
        assert served.rig.job(job_id).status is JobStatus.COMPLETED


def leave(served: Served, *, is_streamed: bool, num_tokens: int = 3000, **options: Any) -> None:
    """Ask, wait until the job runs, and hang up."""
    headers = options.pop("headers", {})
    body = chat_body(max_completion_tokens=num_tokens, stream=is_streamed, **options)
    before = num_jobs(served)
    with httpx.Client(timeout=30) as client, ThreadPoolExecutor(1) as threads:

        def ask() -> None:
            with client.stream(
                "POST", f"{served.server.url}/v1/chat/completions", json=body, headers=headers
            ) as answer:
                next(answer.iter_lines())

        asked = threads.submit(ask)
        wait_until(lambda: num_jobs(served) > before)
        asked.result()


def test_t7_a_long_wait_is_kept_alive_with_line_breaks(served: Served) -> None:
    answer = post(served, max_completion_tokens=100)
    assert answer.content.startswith(b"\n")
    assert answer.json()["usage"]["completion_tokens"] == 100
    without = post(served, {"X-Keep-Alive": "off"}, max_completion_tokens=100)
    assert without.content.startswith(b"{")


def test_a_deadline_is_told_with_its_own_status_and_no_retry(served: Served) -> None:
    answer = post(served, {"Cancel-After": "1s", "X-Keep-Alive": "off"}, max_completion_tokens=3000)
    assert answer.status_code == 504, answer.text
    assert answer.json()["error"]["code"] == "deadline_exceeded"
    assert answer.headers["x-should-retry"] == "false"


def test_t4_a_failure_in_mid_stream_is_an_error_frame_and_the_sdk_raises_it(
    client: openai.OpenAI, hand_worker: HandWorker
) -> None:
    stream = client.chat.completions.create(model="fake", messages=MESSAGES, max_tokens=9, stream=True)
    job_id = stream.response.headers["x-job-id"]
    job = hand_worker.claim(job_id)
    hand_worker.say(job, "one ", "two ")
    hand_worker.finish(
        job, "one ", "two ", status=JobStatus.FAILED, error=JobError(code="poison_job", message="it crashed")
    )
    seen: list[str | None] = []
    with pytest.raises(openai.APIError) as raised:
        seen.extend(chunk.choices[0].delta.content for chunk in stream)
    assert seen == ["", "one ", "two "]
    assert raised.value.code == "poison_job"
    assert raised.value.type == "server_error"


@pytest.mark.parametrize("status", [JobStatus.FAILED, JobStatus.CANCELLED])
def test_a_whole_answer_that_cannot_be_has_its_status(
    client: openai.OpenAI, hand_worker: HandWorker, status: JobStatus
) -> None:
    def end() -> None:
        def waiting() -> Any:
            with hand_worker.sessions() as session:
                return job_queries.list_jobs(session, DEFAULT_TENANT_ID)

        job = hand_worker.claim(external_id(wait_until(waiting)[0].id))
        error = JobError(code="engine_error", message="it broke") if status is JobStatus.FAILED else None
        hand_worker.finish(job, status=status, error=error)

    with ThreadPoolExecutor(1) as threads:
        ended = threads.submit(end)
        with pytest.raises(openai.APIStatusError) as raised:
            client.chat.completions.create(model="fake", messages=MESSAGES, max_tokens=9)
        ended.result()
    assert (raised.value.status_code, raised.value.code) == (
        (500, "engine_error") if status is JobStatus.FAILED else (410, "job_cancelled")
    )


def test_the_job_behind_a_chat_reads_the_same_from_every_cursor(served: Served) -> None:
    completion = post(served, max_completion_tokens=30, n=2).json()
    with served.server.client() as http:
        lines = http.get(f"/v1/jobs/{completion['id']}/events").text.split("\n\n")
        deltas = [json.loads(line.split("data: ")[1]) for line in lines if "event: output.delta" in line]
        for cursor in range(len(deltas) + 1):
            rest = http.get(f"/v1/jobs/{completion['id']}/events", params={"starting_after": cursor}).text
            again = [json.loads(line.split("data: ")[1]) for line in rest.split("\n\n") if "output.delta" in line]
            assert deltas[:cursor] + again == deltas
    for choice in completion["choices"]:
        own = "".join(delta["text"] for delta in deltas if delta["index"] == choice["index"])
        assert own == choice["message"]["content"]


def test_t8_t9_a_full_queue_says_when_to_come_back(served: Served) -> None:
    served.worker.runner.stop(release=True)
    with served.rig.sessions.begin() as session:
        session.execute(update(Tenant).values(max_queued=0))
    answer = post(served)
    assert answer.status_code == 429
    assert answer.json()["error"]["type"] == "rate_limit_error"
    assert 1 <= int(answer.headers["retry-after"]) <= 60


def test_models_are_listed_and_found_by_names_with_slashes(served: Served) -> None:
    [model] = [model for model in served.client.models.list().data if model.id == "test-model"]
    assert served.client.models.retrieve("test-model").model_extra == model.model_extra
    assert model.model_extra is not None
    assert model.model_extra["max_model_len"] == 4096
    with pytest.raises(openai.NotFoundError) as raised:
        served.client.models.retrieve("org/none")
    assert raised.value.code == "model_not_found"


def test_t6_t14_t15_extras_come_in_at_top_level_and_foreign_headers_are_ignored(served: Served) -> None:
    answer = served.client.chat.completions.create(
        model="test-model",
        messages=MESSAGES,
        max_tokens=6,
        user="somebody",
        prompt_cache_key="cache",
        extra_body={"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "min_tokens": 2, "ignore_eos": True},
        extra_headers={"OpenAI-Organization": "org-x", "OpenAI-Project": "proj-x", "OpenAI-Beta": "x=1"},
    )
    assert answer.choices[0].finish_reason == "length"
    with served.rig.sessions() as session:
        record = job_queries.get(session, parse_id(answer.id), DEFAULT_TENANT_ID, with_request=True)
    assert record is not None
    assert isinstance(record.request, GenerationRequest)
    params = record.request.params
    assert (params.top_k, params.min_p, params.repetition_penalty, params.min_tokens) == (5, 0.1, 1.1, 2)
    assert post(served, stream=True).content.endswith(b"data: [DONE]\n\n")
