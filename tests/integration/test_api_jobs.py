"""The native job API over HTTP: submit, look, wait, read, list, cancel, delete."""

import threading
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import httpx
import pytest
from pydantic import TypeAdapter
from sqlalchemy.orm import Session, sessionmaker

from api.model_queues import UNKNOWN_PLACE
from dialects.native import JobListView, JobView
from domain.jobs import JobError, JobStatus, external_id
from storage import workers
from storage.workers import WorkerReport
from tests.integration.api_harness import CONTEXT, MODEL, ApiServer, HandWorker, body, make_chunk, post_job
from tests.waiting import slowness, wait_until


def test_a_submitted_job_is_accepted_with_its_view_and_where_to_look(http: httpx.Client) -> None:
    response = http.post("/v1/jobs", json=body(metadata={"trace": "a1"}, priority=3))
    job = TypeAdapter(JobView).validate_json(response.content)
    assert response.status_code == 202
    assert (job["status"], job["model"], job["priority"], job["metadata"]) == (
        JobStatus.QUEUED,
        MODEL,
        3,
        {"trace": "a1"},
    )
    assert response.headers["location"] == job["urls"]["get"] == f"/v1/jobs/{job['id']}"
    assert response.headers["x-job-id"] == job["id"]
    assert response.headers["retry-after"] == "1"
    assert response.headers["x-request-id"].startswith("req_")


def test_looking_at_a_job_tells_what_submitting_it_told(http: httpx.Client) -> None:
    posted = post_job(http, metadata={"a": "b"}, deadline=(datetime.now(UTC) + timedelta(hours=1)).isoformat())
    seen = http.get(posted["urls"]["get"]).json()
    assert seen | {"queue": None} == posted | {"queue": None}
    assert seen["queue"] == {**UNKNOWN_PLACE, "position": 0, "waiting_for": "worker"}


def test_every_default_is_settled_when_a_job_is_accepted(http: httpx.Client) -> None:
    job = post_job(http, params={"top_p": 0.5})
    params = http.get(job["urls"]["get"], params={"include": "input"}).json()["input"]["params"]
    assert (params["temperature"], params["top_p"], params["top_k"]) == (1.0, 0.5, 0)
    assert params["max_tokens"] == CONTEXT - len("Hello")
    assert isinstance(params["seed"], int)


def test_messages_are_stored_as_they_were_sent(http: httpx.Client) -> None:
    messages = [{"role": "user", "content": "Hi\0 there 🙂"}]
    response = http.post("/v1/jobs", json={"model": MODEL, "messages": messages})
    seen = http.get(response.json()["urls"]["get"], params={"include": "input"}).json()
    assert seen["input"]["messages"] == messages
    assert seen["input"]["prompt"] is None


def test_a_finished_job_holds_its_output_usage_and_times(http: httpx.Client, hand_worker: HandWorker) -> None:
    job_id = post_job(http)["id"]
    hand_worker.run(job_id, "Good ", "day")
    job = TypeAdapter(JobView).validate_json(http.get(f"/v1/jobs/{job_id}").content)
    assert job["status"] is JobStatus.COMPLETED
    output: Any = job["output"]
    assert output["text"] == output["choices"][0]["text"] == "Good day"
    assert job["usage"] is not None
    used = (job["usage"]["prompt_tokens"], job["usage"]["completion_tokens"], job["usage"]["total_tokens"])
    assert used == (5, 8, 13)
    assert job["finish_reason"] == "stop"
    assert job["started_at"] is not None
    assert job["finished_at"] is not None
    assert job["expires_at"] is not None
    assert job["created_at"] <= job["started_at"] <= job["finished_at"] < job["expires_at"]
    assert job["queue"] is None


def test_a_failed_job_says_why(http: httpx.Client, hand_worker: HandWorker) -> None:
    claimed = hand_worker.claim(post_job(http)["id"])
    error = JobError(code="engine_error", message="the model could not run this sequence")
    hand_worker.finish(claimed, status=JobStatus.FAILED, error=error)
    job = http.get(f"/v1/jobs/{external_id(claimed.id)}").json()
    assert job["status"] == "failed"
    assert job["error"] == {
        "code": "engine_error",
        "message": "the model could not run this sequence",
        "type": "server_error",
        "retryable": False,
    }


# Waiting


def test_a_long_poll_returns_when_the_job_ends(http: httpx.Client, api: ApiServer, hand_worker: HandWorker) -> None:
    job_id = post_job(http)["id"]
    answers: list[httpx.Response] = []
    waiting = threading.Thread(target=lambda: answers.append(http.get(f"/v1/jobs/{job_id}", params={"wait": 30})))
    waiting.start()
    wait_until(lambda: api.services.streams.num_streams == 1)
    hand_worker.run(job_id, "done")
    waiting.join()
    assert answers[0].json()["status"] == "completed"


def test_a_long_poll_ends_with_the_job_as_it_is_when_the_time_is_over(http: httpx.Client) -> None:
    response = http.get(post_job(http)["urls"]["get"], params={"wait": 1})
    assert response.status_code == 200
    assert response.json()["status"] == "queued"
    assert response.headers["openai-poll-after-ms"] == "1000"


def test_waiting_for_a_finished_job_takes_no_time(http: httpx.Client, hand_worker: HandWorker) -> None:
    job_id = post_job(http)["id"]
    hand_worker.run(job_id, "done")
    response = http.get(f"/v1/jobs/{job_id}", params={"wait": 60})
    assert response.elapsed < timedelta(seconds=5 * slowness())


def test_a_preferred_wait_brings_the_result_with_the_submission(
    http: httpx.Client, api: ApiServer, hand_worker: HandWorker
) -> None:
    answers: list[httpx.Response] = []
    headers = {"prefer": "respond-async, wait=30"}
    submit = threading.Thread(target=lambda: answers.append(http.post("/v1/jobs", json=body(), headers=headers)))
    submit.start()
    wait_until(lambda: api.services.streams.num_streams == 1)
    with api.client() as other:
        hand_worker.run(other.get("/v1/jobs").json()["data"][0]["id"], "here")
    submit.join()
    assert answers[0].status_code == 200
    assert answers[0].headers["preference-applied"] == "wait=30"
    assert answers[0].json()["output"]["text"] == "here"


def test_a_preferred_wait_that_is_over_leaves_an_accepted_job(http: httpx.Client) -> None:
    response = http.post("/v1/jobs", json=body(), headers={"prefer": "wait=1"})
    assert response.status_code == 202
    assert response.headers["preference-applied"] == "wait=1"
    assert response.json()["status"] == "queued"


@pytest.mark.parametrize("prefer", ["wait=soon", "waiting=5", "", "handling=lenient"])
def test_a_preference_that_cannot_be_read_is_ignored(http: httpx.Client, prefer: str) -> None:
    response = http.post("/v1/jobs", json=body(), headers={"prefer": prefer})
    assert response.status_code == 202
    assert "preference-applied" not in response.headers


# Idempotency


def test_the_same_key_and_request_is_one_job(http: httpx.Client) -> None:
    headers = {"idempotency-key": "order-7"}
    first, second = (http.post("/v1/jobs", json=body(), headers=headers) for _ in range(2))
    assert first.json()["id"] == second.json()["id"]
    assert "idempotent-replayed" not in first.headers
    assert (second.status_code, second.headers["idempotent-replayed"]) == (202, "true")
    assert len(http.get("/v1/jobs").json()["data"]) == 1


def test_a_replayed_submission_of_a_finished_job_brings_its_result(http: httpx.Client, hand_worker: HandWorker) -> None:
    job_id = post_job(http, idempotency_key="order-8")["id"]
    hand_worker.run(job_id, "once")
    response = http.post("/v1/jobs", json=body(idempotency_key="order-8"))
    assert (response.status_code, response.json()["output"]["text"]) == (200, "once")


def test_the_same_key_with_another_request_is_refused(http: httpx.Client) -> None:
    post_job(http, idempotency_key="order-9")
    response = http.post("/v1/jobs", json=body(idempotency_key="order-9", prompt="Goodbye"))
    assert (response.status_code, response.json()["error"]["code"]) == (422, "idempotency_key_reused")


def test_header_and_body_must_name_the_same_key(http: httpx.Client) -> None:
    response = http.post("/v1/jobs", json=body(idempotency_key="a"), headers={"idempotency-key": "b"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "idempotency_key")


# Output


HEADERS = {
    "cancel-after": "1h",
    "x-start-timeout": "5m",
    "x-run-timeout": "60s",
    "x-priority": "-7",
}


def test_headers_are_options_unless_the_body_has_them(http: httpx.Client) -> None:
    answer = http.post("/v1/jobs", json=body(), headers=HEADERS)
    assert answer.status_code == 202, answer.text
    job = answer.json()
    assert (job["start_timeout"], job["run_timeout"], job["priority"]) == (300.0, 60.0, -7)
    assert 3_590 < _seconds_between(job["created_at"], job["deadline"]) < 3_610
    deadline = (datetime.now(UTC) + timedelta(hours=2)).isoformat()
    own = body(start_timeout=7, run_timeout=8, priority=0, deadline=deadline)
    job = http.post("/v1/jobs", json=own, headers=HEADERS).json()
    assert (job["start_timeout"], job["run_timeout"], job["priority"]) == (7.0, 8.0, 0)
    assert _seconds_between(job["created_at"], job["deadline"]) > 7_000


def _seconds_between(first: str, second: str) -> float:
    return (datetime.fromisoformat(second) - datetime.fromisoformat(first)).total_seconds()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("X-Start-Timeout", "banana"),
        ("X-Run-Timeout", "0"),
        ("Cancel-After", "x"),
        ("X-Priority", "77"),
        ("X-Webhook", "nonsense"),
    ],
)
def test_bad_options_in_headers_are_refused(http: httpx.Client, name: str, value: str) -> None:
    answer = http.post("/v1/jobs", json=body(), headers={name: value})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_value"), answer.text


def test_output_is_text_or_json_as_accepted(http: httpx.Client, hand_worker: HandWorker) -> None:
    job_id = post_job(http)["id"]
    hand_worker.run(job_id, "<b>1</b>", "\n2")
    text = http.get(f"/v1/jobs/{job_id}/output")
    json = http.get(f"/v1/jobs/{job_id}/output", headers={"accept": "application/json"}).json()
    assert text.text == "<b>1</b>\n2"
    assert text.headers["content-type"] == "text/plain; charset=utf-8"
    assert text.headers["x-content-type-options"] == "nosniff"
    assert (json["status"], json["text"]) == ("completed", "<b>1</b>\n2")


def test_output_of_a_running_job_is_what_it_has_so_far(http: httpx.Client, hand_worker: HandWorker) -> None:
    job_id = post_job(http, params={"n": 2, "max_tokens": 16})["id"]
    claimed = hand_worker.claim(job_id)
    hand_worker.commit(claimed, make_chunk(1, "one"), make_chunk(2, "two", index=1), make_chunk(3, "!", index=1))
    assert http.get(f"/v1/jobs/{job_id}/output").text == "one"
    assert http.get(f"/v1/jobs/{job_id}/output", params={"index": 1}).text == "two!"
    job = http.get(f"/v1/jobs/{job_id}", params={"include": "output"}).json()
    assert [choice["text"] for choice in job["output"]["choices"]] == ["one", "two!"]
    assert job["usage"]["completion_tokens"] == 7
    assert http.get(f"/v1/jobs/{job_id}").json()["output"] is None


def test_output_of_a_waiting_job_is_empty(http: httpx.Client) -> None:
    assert http.get(post_job(http)["urls"]["output"]).text == ""


# Cancelling and deleting


def test_a_queued_job_is_cancelled_at_once_and_again_without_effect(http: httpx.Client) -> None:
    job = post_job(http)
    for _ in range(2):
        cancelled = http.post(job["urls"]["cancel"])
        assert (cancelled.status_code, cancelled.json()["status"]) == (200, "cancelled")


def test_a_running_job_is_asked_to_stop(http: httpx.Client, hand_worker: HandWorker) -> None:
    claimed = hand_worker.claim(post_job(http)["id"])
    asked = http.post(f"/v1/jobs/{external_id(claimed.id)}/cancel").json()
    assert (asked["status"], asked["cancel_requested"]) == ("in_progress", True)


def test_cancelling_a_finished_job_changes_nothing(http: httpx.Client, hand_worker: HandWorker) -> None:
    job_id = post_job(http)["id"]
    hand_worker.run(job_id, "done")
    job = http.post(f"/v1/jobs/{job_id}/cancel").json()
    assert (job["status"], job["output"]["text"], job["cancel_requested"]) == ("completed", "done", False)


def test_a_deleted_job_is_gone(http: httpx.Client, hand_worker: HandWorker) -> None:
    job_id = post_job(http)["id"]
    hand_worker.run(job_id, "secret")
    assert http.delete(f"/v1/jobs/{job_id}").json() == {"id": job_id, "object": "job", "deleted": True}
    for path in ("", "/events", "/output"):
        assert http.get(f"/v1/jobs/{job_id}{path}").status_code == 404
    assert http.delete(f"/v1/jobs/{job_id}").status_code == 404


# Lists


def test_pages_follow_one_another_without_gap_or_repeat(http: httpx.Client) -> None:
    posted = [post_job(http)["id"] for _ in range(7)]
    for order, expected in (("asc", posted), ("desc", posted[::-1])):
        seen: list[str] = []
        cursor: dict[str, str] = {}
        while True:
            page = http.get("/v1/jobs", params={"limit": 3, "order": order, **cursor})
            listed = TypeAdapter(JobListView).validate_json(page.content)
            assert (listed["first_id"], listed["last_id"]) == (listed["data"][0]["id"], listed["data"][-1]["id"])
            seen += [job["id"] for job in listed["data"]]
            if not listed["has_more"]:
                break
            cursor = {"after": str(listed["last_id"])}
        assert seen == expected


def test_lists_are_filtered(http: httpx.Client, hand_worker: HandWorker) -> None:
    plain = post_job(http)["id"]
    large = post_job(http, model="large", metadata={"team": "blue", "run": "1"})["id"]
    done = post_job(http, metadata={"team": "blue"})["id"]
    hand_worker.run(done, "x")

    def listed(**params: str) -> list[str]:
        return [job["id"] for job in http.get("/v1/jobs", params={"order": "asc", **params}).json()["data"]]

    assert listed(status="queued") == [plain, large]
    assert listed(model="large") == [large]
    assert listed(**{"metadata[team]": "blue"}) == [large, done]
    assert listed(**{"metadata[team]": "blue", "metadata[run]": "1"}) == [large]
    assert listed(created_after=(datetime.now(UTC) + timedelta(minutes=1)).isoformat()) == []
    assert listed(created_after=(datetime.now(UTC) - timedelta(minutes=1)).isoformat()) == [plain, large, done]


def test_an_empty_list_has_no_cursors(http: httpx.Client) -> None:
    assert http.get("/v1/jobs").json() == {
        "object": "list",
        "data": [],
        "first_id": None,
        "last_id": None,
        "has_more": False,
    }


def test_ids_are_accepted_under_every_prefix(http: httpx.Client) -> None:
    job_id = post_job(http)["id"]
    for prefix in ("chatcmpl-", "resp_", "cmpl-"):
        assert http.get(f"/v1/jobs/{prefix}{job_id.removeprefix('job_')}").json()["id"] == job_id


def test_a_job_names_its_worker_and_the_time_of_its_first_token(
    http: httpx.Client, hand_worker: HandWorker, session_factory: sessionmaker[Session]
) -> None:
    name = post_job(http)["id"]

    def seen() -> tuple[object, object, object]:
        [listed] = http.get("/v1/jobs").json()["data"]
        job = http.get(f"/v1/jobs/{name}?include=attempts").json()
        assert {key: listed[key] for key in ("worker", "first_token_at")} == {
            key: job[key] for key in ("worker", "first_token_at")
        }
        return job["worker"], job["first_token_at"], [attempt["worker"] for attempt in job["attempts"]]

    assert seen() == (None, None, [])
    report = WorkerReport(hand_worker.owner, "gpu@here", MODEL, 4, 0, 0.0)
    with session_factory.begin() as session:
        workers.heartbeat(session, report)
    job = hand_worker.claim(name)
    assert seen() == ("gpu@here", None, ["gpu@here"])
    hand_worker.say(job, "a")
    worker, first_token_at, _ = seen()
    assert worker == "gpu@here"
    assert first_token_at is not None
    hand_worker.release(job)
    with session_factory.begin() as session:
        workers.forget(session, hand_worker.owner)
    assert seen() == ("gpu@here", first_token_at, ["gpu@here"])  # the last one, though it is gone
    hand_worker.owner = uuid4()
    hand_worker.claim(name)
    assert seen() == (None, first_token_at, ["gpu@here", None])  # one that has not reported itself


def test_a_callback_is_refused_where_none_are_sent(http: httpx.Client) -> None:
    body = {"model": "fake", "prompt": "a", "celery": {"queue": "celery", "headers": {"id": "t1"}}}
    refused = http.post("/v1/jobs", json=body)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "celery"
    assert "CELERIAC_CALLBACK_BROKER_URL" in refused.json()["error"]["message"]
