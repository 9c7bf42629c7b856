"""What headers ask of a job, and the words with which an answer ends that does not end well, on every OpenAI route."""

import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from uuid import UUID

import httpx
import openai
import pytest
from openai.types.responses import Response
from sqlalchemy import update

from domain.jobs import JobError, JobStatus, external_id, parse_id
from settings import Settings
from storage import job_queries, jobs
from storage.streams import publish
from storage.tables import DEFAULT_TENANT_ID, Job
from tests.conformance.harness import MESSAGES
from tests.integration.api_harness import ApiServer, HandWorker
from tests.waiting import wait_until

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
BODY_BY_ROUTE: dict[str, dict[str, Any]] = {
    CHAT: {"model": "fake", "messages": MESSAGES, "max_tokens": 9},
    COMPLETIONS: {"model": "fake", "prompt": "Hi", "max_tokens": 9},
    RESPONSES: {"model": "fake", "input": "Hi", "max_output_tokens": 9},
}
every_route = pytest.mark.parametrize("route", BODY_BY_ROUTE)


@pytest.fixture
def api_settings(database_url: str, redis_url: str) -> Settings:
    return Settings(database_url=database_url, redis_url=redis_url, stream_heartbeat_seconds=0.05)


def the_job(worker: HandWorker) -> Job:
    """The only one there is, once it is there."""

    def found() -> list[Job]:
        with worker.sessions() as session:
            return job_queries.list_jobs(session, DEFAULT_TENANT_ID)

    listed: list[Job] = wait_until(found)
    return listed[0]


def expire(worker: HandWorker, job_id: UUID, **columns: Any) -> None:
    """As the janitor does once the time in `columns` is over, which is now."""
    with worker.sessions.begin() as session:
        session.execute(update(Job).where(Job.id == job_id).values(**columns))
    with worker.sessions.begin() as session:
        expired = jobs.expire(session)
    publish(worker.redis, [(job.job_id, job.status) for job in expired])


@contextmanager
def asked(http: httpx.Client, route: str, headers: dict[str, str]) -> Iterator["Future[httpx.Response]"]:
    with ThreadPoolExecutor(1) as threads:
        yield threads.submit(http.post, route, json=BODY_BY_ROUTE[route], headers=headers)


# Knobs


@every_route
def test_a_job_that_has_not_started_in_time_expires(http: httpx.Client, hand_worker: HandWorker, route: str) -> None:
    with asked(http, route, {"X-Start-Timeout": "5m", "X-Keep-Alive": "off"}) as answer:
        job = the_job(hand_worker)
        assert job.start_deadline_at is not None
        assert (job.start_deadline_at - job.created_at).total_seconds() == pytest.approx(300, abs=1)
        expire(hand_worker, job.id, start_deadline_at=job.created_at)
    assert (answer.result().status_code, answer.result().json()["error"]["code"]) == (504, "start_timeout_exceeded")
    assert "output" not in answer.result().json()["error"]["message"], "it has none"


def test_one_that_has_started_in_time_may_take_longer(http: httpx.Client, hand_worker: HandWorker) -> None:
    with asked(http, CHAT, {"X-Start-Timeout": "90s"}) as answer:
        job = the_job(hand_worker)
        claimed = hand_worker.claim(external_id(job.id))
        expire(hand_worker, job.id, start_deadline_at=job.created_at)
        hand_worker.say(claimed, "late")
        hand_worker.finish(claimed, "late")
    assert answer.result().json()["choices"][0]["message"]["content"] == "late"


@every_route
def test_a_priority_is_the_jobs_and_goes_before_the_tier(
    http: httpx.Client, hand_worker: HandWorker, route: str
) -> None:
    body = BODY_BY_ROUTE[route] | {"service_tier": "flex"}
    with http.stream("POST", route, json=body | {"stream": True}, headers={"X-Priority": "7"}) as answer:
        assert answer.status_code == 200
        job = the_job(hand_worker)
        assert job.priority == 7
        hand_worker.run(external_id(job.id), "done")
        datas = datas_of(answer.read().decode())
    assert datas[0].get("service_tier", datas[0].get("response", {}).get("service_tier")) == "priority"


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("X-Priority", "11"),
        ("X-Priority", "high"),
        ("X-Start-Timeout", "soon"),
        ("X-Start-Timeout", "200h"),
        ("X-Run-Timeout", "0"),
    ],
)
def test_a_knob_that_cannot_be_is_refused_by_name(http: httpx.Client, header: str, value: str) -> None:
    for route, body in BODY_BY_ROUTE.items():
        answer = http.post(route, json=body, headers={header: value})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == header
        assert value in answer.json()["error"]["message"]


# Ends


@contextmanager
def half_told(http: httpx.Client, worker: HandWorker, route: str) -> Iterator[tuple[Any, Iterator[str]]]:
    """A stream whose job has said two words: the claimed job, and the lines behind the second word."""
    with http.stream("POST", route, json=BODY_BY_ROUTE[route] | {"stream": True}) as answer:
        assert answer.status_code == 200
        job = worker.claim(answer.headers["x-job-id"])
        worker.say(job, "one ", "two")
        lines = answer.iter_lines()
        told = ""
        while '"two"' not in told and '" two"' not in told:
            told = next(lines)
        yield job, lines


def datas_of(body: str) -> list[Any]:
    datas = [line.removeprefix("data: ") for line in body.splitlines() if line.startswith("data: ")]
    return [json.loads(data) for data in datas if data != "[DONE]"]


def end(worker: HandWorker, job: Any, status: JobStatus) -> None:
    error = JobError(code="engine_error", message="it broke") if status is JobStatus.FAILED else None
    worker.finish(job, "one ", "two", status=status, error=error)


ENDS = [
    (JobStatus.FAILED, "engine_error", "response.failed"),
    (JobStatus.CANCELLED, "job_cancelled", "response.failed"),
    (JobStatus.EXPIRED, "deadline_exceeded", "response.incomplete"),
]

WHOLE_ENDS = [
    (JobStatus.FAILED, "engine_error", 500),
    (JobStatus.CANCELLED, "job_cancelled", 410),
    (JobStatus.EXPIRED, "deadline_exceeded", 504),
]


@every_route
@pytest.mark.parametrize(("status", "code", "last_event"), ENDS)
def test_t4_t5_a_job_that_ends_badly_in_mid_stream_is_never_a_silent_cut(
    http: httpx.Client, hand_worker: HandWorker, route: str, status: JobStatus, code: str, last_event: str
) -> None:
    with half_told(http, hand_worker, route) as (job, lines):
        end(hand_worker, job, status)
        rest = list(lines)
    assert rest[-1] == "", "the last event ends in a blank line"
    assert "data: [DONE]" not in rest
    last = datas_of("\n".join(rest))[-1]
    if route == RESPONSES:
        assert (last["type"], last["response"]["output"][0]["content"][0]["text"]) == (last_event, "one two")
    else:
        assert last["error"]["code"] == code
        assert set(last["error"]) >= {"message", "type", "param", "code"}


@every_route
@pytest.mark.parametrize(("status", "code", "http_status"), WHOLE_ENDS)
def test_a_whole_answer_of_a_job_that_ends_badly_is_an_error(
    http: httpx.Client, hand_worker: HandWorker, route: str, status: JobStatus, code: str, http_status: int
) -> None:
    with asked(http, route, {"X-Keep-Alive": "off"}) as answer:
        job = hand_worker.claim(external_id(the_job(hand_worker).id))
        hand_worker.say(job, "one ", "two")
        end(hand_worker, job, status)
    if route == RESPONSES and status is JobStatus.EXPIRED:
        return  # see below
    assert (answer.result().status_code, answer.result().json()["error"]["code"]) == (http_status, code)


def test_a_whole_response_that_its_deadline_cut_off_is_incomplete_as_its_stream_would_end(
    http: httpx.Client, client: openai.OpenAI, hand_worker: HandWorker
) -> None:
    with asked(http, RESPONSES, {"X-Keep-Alive": "off"}) as answer:
        job = hand_worker.claim(external_id(the_job(hand_worker).id))
        hand_worker.say(job, "one ", "two")
        end(hand_worker, job, JobStatus.EXPIRED)
    assert answer.result().status_code == 200
    response = Response.model_validate(answer.result().json())
    assert (response.status, response.output_text, response.error) == ("incomplete", "one two", None)
    *_, last = client.responses.retrieve(response.id, stream=True)
    assert last.type == "response.incomplete"
    assert last.response == client.responses.retrieve(response.id) == response


def test_t4_a_completion_that_fails_in_mid_stream_is_raised_by_the_sdk(
    client: openai.OpenAI, hand_worker: HandWorker
) -> None:
    stream = client.completions.create(model="fake", prompt="Hi", max_tokens=9, stream=True)
    job = hand_worker.claim(stream.response.headers["x-job-id"])
    hand_worker.say(job, "one ", "two")
    end(hand_worker, job, JobStatus.FAILED)
    with pytest.raises(openai.APIError) as raised:
        list(stream)
    assert (raised.value.code, raised.value.type) == ("engine_error", "server_error")


@every_route
def test_a_job_that_is_deleted_under_its_stream_is_told_as_such(
    http: httpx.Client, hand_worker: HandWorker, route: str
) -> None:
    with half_told(http, hand_worker, route) as (job, lines):
        assert http.delete(f"/v1/jobs/{external_id(job.id)}").is_success
        last = datas_of("\n".join(lines))[-1]
    assert (last if route == RESPONSES else last["error"])["code"] == "job_not_found"


@every_route
def test_a_draining_server_ends_its_streams_and_the_job_goes_on(
    api: ApiServer, http: httpx.Client, hand_worker: HandWorker, route: str
) -> None:
    with half_told(http, hand_worker, route) as (job, lines):
        api.app.state.drain_seconds = 0.0
        api.stop()
        rest = list(lines)
    assert rest[-1] == ""
    last = datas_of("\n".join(rest))[-1]
    error = last if route == RESPONSES else last["error"]
    assert error["code"] == "server_is_overloaded"
    assert external_id(job.id).removeprefix("job_") in error["message"], "it says where to go on"
    if route == RESPONSES:
        assert last["type"] == "error"
    with ApiServer(api.services.settings) as other, other.client() as elsewhere:
        end(hand_worker, job, JobStatus.COMPLETED)
        assert elsewhere.get(f"/v1/jobs/{external_id(job.id)}").json()["output"]["text"] == "one two"


@every_route
def test_t7_where_there_is_no_answer_behind_a_wait_that_was_kept_alive_the_connection_is_cut(
    http: httpx.Client, hand_worker: HandWorker, route: str
) -> None:
    with http.stream("POST", route, json=BODY_BY_ROUTE[route]) as answer:
        assert answer.status_code == 200, "the first line break has committed it"
        job = hand_worker.claim(answer.headers["x-job-id"])
        hand_worker.say(job, "one ", "two")
        end(hand_worker, job, JobStatus.FAILED)
        with pytest.raises(httpx.RemoteProtocolError):
            answer.read()


# What any client relies on


def test_t11_any_2xx_is_success(client: openai.OpenAI) -> None:
    """A job is accepted with 202, and the SDK takes that for what it is."""
    asked: Any = {"model": "fake", "prompt": "Hi", "params": {"max_tokens": 2}}
    job: Any = client.post("/jobs", cast_to=object, body=asked)
    assert job["status"] == "queued"


def test_t16_what_is_polled_says_when_to_ask_again_until_it_has_ended(
    client: openai.OpenAI, hand_worker: HandWorker
) -> None:
    answer = client.responses.create(model="fake", input="Hi", background=True)
    raw = client.responses.with_raw_response.retrieve(answer.id)
    assert raw.parse().status in ("queued", "in_progress")
    assert int(raw.headers["openai-poll-after-ms"]) > 0
    assert 1 <= int(raw.headers["retry-after"]) <= 60
    hand_worker.run(external_id(parse_id(answer.id)), "done")
    raw = client.responses.with_raw_response.retrieve(answer.id)
    assert raw.parse().status == "completed"
    assert "openai-poll-after-ms" not in raw.headers
