"""Files and batches through the unmodified SDK: what is refused and why, whose they are, and every end of a batch.

Maintenance is stepped by hand here, and a hand does the worker's part; tests/integration/test_batches_end_to_end.py has
the real processes.
"""

import io
import itertools
import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import openai
import pytest
from openai.types import Batch as SdkBatch
from openai.types.responses import Response
from sqlalchemy import text, update
from sqlalchemy.orm import Session, sessionmaker

from domain.jobs import external_id, parse_id_of_other
from maintenance.batches import BatchWork
from settings import Settings
from storage import database, files, jobs
from storage.files import Batch, File
from storage.tables import Job, Tenant
from tests.integration.api_harness import CATALOG, ApiServer, HandWorker
from tests.waiting import SECONDS, wait_until
from text.models import ModelViews

CHAT: Any = "/v1/chat/completions"


@pytest.fixture
def settings_changes() -> dict[str, Any]:
    return {}


@pytest.fixture
def api_settings(database_url: str, redis_url: str, settings_changes: dict[str, Any]) -> Settings:
    return Settings(database_url=database_url, redis_url=redis_url, **settings_changes)


@pytest.fixture
def work(
    session_factory: sessionmaker[Session], api_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> Iterator[BatchWork]:
    """A tick goes as far as it can go now, also where that takes this machine long."""
    monkeypatch.setattr("maintenance.batches.TICK_SECONDS", SECONDS)
    views = ModelViews(CATALOG)
    work = BatchWork(session_factory, views, api_settings)
    yield work
    work.close()


def line(number: int, **changes: Any) -> dict[str, Any]:
    body = {"model": "fake", "messages": [{"role": "user", "content": f"Number {number}"}], "max_tokens": 8}
    return {"custom_id": f"line-{number}", "method": "POST", "url": CHAT, "body": body} | changes


def jsonl(*lines: Any) -> bytes:
    return b"".join(one if isinstance(one, bytes) else json.dumps(one).encode() + b"\n" for one in lines)


def upload(client: openai.OpenAI, content: bytes, **options: Any) -> openai.types.FileObject:
    return client.files.create(file=("in.jsonl", io.BytesIO(content)), purpose="batch", **options)


def create(client: openai.OpenAI, *lines: Any, **options: Any) -> SdkBatch:
    file = upload(client, jsonl(*lines))
    given: Any = {"endpoint": CHAT, "completion_window": "24h"} | options
    return client.batches.create(input_file_id=file.id, **given)


def read_lines(client: openai.OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    assert file_id is not None
    return [json.loads(one) for one in client.files.content(file_id).text.splitlines()]


def job_ids(sessions: sessionmaker[Session]) -> list[str]:
    with sessions() as session:
        return [external_id(row.id) for row in session.query(Job).order_by(Job.id)]


# Files


def test_a_look_at_batches_without_a_database_is_put_off(
    api_settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    views = ModelViews(CATALOG)
    sessions = database.session_factory(database.open_database("postgresql://nobody@127.0.0.1:1/none"))
    work = BatchWork(sessions, views, api_settings)
    work.tick()
    work.close()
    assert "batches are waiting for the database" in caplog.text


def test_a_file_comes_back_as_it_was_sent(client: openai.OpenAI) -> None:
    content = jsonl(*(line(number, custom_id=f"ü{number}" * 50) for number in range(6000)))
    assert len(content) > 2 * 1_048_576
    file = upload(client, content, expires_after={"anchor": "created_at", "seconds": 7200})
    assert (file.bytes, file.filename, file.purpose, file.status) == (len(content), "in.jsonl", "batch", "processed")
    assert file.expires_at is not None
    assert 7195 <= file.expires_at - file.created_at <= 7205
    assert client.files.content(file.id).content == content
    assert client.files.retrieve(file.id) == file
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError, match="there is no file"):
        client.files.retrieve(file.id)


def test_files_are_listed_page_by_page(client: openai.OpenAI) -> None:
    ids = [upload(client, jsonl(line(number))).id for number in range(5)]
    assert [file.id for file in client.files.list(limit=2)] == ids[::-1]
    assert [file.id for file in client.files.list(limit=2, order="asc", purpose="batch")] == ids
    assert [file.id for file in client.files.list(purpose="batch_output")] == []
    page = client.files.list(limit=5)
    assert not page.has_more


@pytest.mark.parametrize(
    ("form", "param"),
    [
        ({"files": {"file": b"{}"}}, "purpose"),
        ({"files": {"file": b"{}"}, "data": {"purpose": "fine-tune"}}, "purpose"),
        ({"files": {"other": b"{}"}, "data": {"purpose": "batch"}}, "file"),
        ({"files": {"file": b""}, "data": {"purpose": "batch"}}, "file"),
        ({"files": [("file", b"1"), ("file", b"2")], "data": {"purpose": "batch"}}, "file"),
        ({"files": {"file": b"{}"}, "data": {"purpose": "batch", "color": "red"}}, "color"),
        ({"files": {"file": b"{}"}, "data": {"purpose": "batch" * 900}}, "purpose"),
        (
            {"files": {"file": b"{}"}, "data": {"purpose": "batch", "expires_after[anchor]": "created_at"}},
            "expires_after[seconds]",
        ),
    ],
)
def test_a_form_is_refused_by_the_field_at_fault(
    http: httpx.Client, session_factory: sessionmaker[Session], form: dict[str, Any], param: str
) -> None:
    response = http.post("/v1/files", **form)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    wait_for_no_files(session_factory)


@pytest.mark.parametrize(
    ("content_type", "body", "status"),
    [
        ("application/json", b"{}", 415),
        ("multipart/form-data", b"", 400),
        ("multipart/form-data; boundary=x", b"not a form at all", 400),
        ("multipart/form-data; boundary=x", b'--x\r\ncontent-disposition: form-data; name="file"\r\n\r\n{}', 400),
    ],
)
def test_what_is_no_form_is_refused(http: httpx.Client, content_type: str, body: bytes, status: int) -> None:
    response = http.post("/v1/files", content=body, headers={"content-type": content_type})
    assert response.status_code == status
    assert response.json()["error"]["message"]


def wait_for_no_files(sessions: sessionmaker[Session]) -> None:

    def is_empty() -> bool:
        with sessions() as session:
            return session.query(File).count() == 0

    wait_until(is_empty, "what was uploaded is discarded")


@pytest.mark.parametrize("settings_changes", [{"max_file_bytes": 100_000}])
def test_a_file_beyond_the_bound_is_refused_while_it_comes(
    client: openai.OpenAI, session_factory: sessionmaker[Session]
) -> None:
    with pytest.raises(openai.APIStatusError) as refused:
        upload(client, b"x" * 110_000)
    assert refused.value.status_code == 413
    wait_for_no_files(session_factory)


@pytest.mark.parametrize("settings_changes", [{"max_file_bytes_per_tenant": 3_000}])
def test_a_tenants_files_have_a_bound_together(
    client: openai.OpenAI, http: httpx.Client, session_factory: sessionmaker[Session]
) -> None:
    first = upload(client, b"x" * 2_000)
    response = http.post("/v1/files", files={"file": b"y" * 2_000}, data={"purpose": "batch"})
    assert response.status_code == 429
    assert response.json()["error"]["code"] == "insufficient_quota"
    assert response.headers["x-should-retry"] == "false"
    client.files.delete(first.id)
    wait_for_no_files(session_factory)
    assert upload(client, b"y" * 2_000).bytes == 2_000


def test_a_full_disk_is_said_and_leaves_nothing_half(
    http: httpx.Client, client: openai.OpenAI, session_factory: sessionmaker[Session]
) -> None:
    """The second piece runs into what PostgreSQL says of a full disk."""
    with session_factory.begin() as session:
        session.execute(
            text("""
            CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN RAISE EXCEPTION 'no space left on device' USING ERRCODE = '53100'; END $$""")
        )
        session.execute(
            text("""
            CREATE TRIGGER full_disk BEFORE INSERT ON file_pieces FOR EACH ROW WHEN (NEW.number = 1)
            EXECUTE FUNCTION full_disk()""")
        )
    response = http.post("/v1/files", files={"file": b"x" * 3_000_000}, data={"purpose": "batch"})
    assert response.status_code == 507
    assert response.json()["error"]["code"] == "storage_full"
    assert list(client.files.list()) == []
    wait_for_no_files(session_factory)


def test_a_broken_off_upload_is_never_seen_and_swept_later(
    client: openai.OpenAI, session_factory: sessionmaker[Session]
) -> None:
    from storage.tables import DEFAULT_TENANT_ID

    with session_factory.begin() as session:
        file_id = files.begin_upload(session, DEFAULT_TENANT_ID, max_bytes=10_000_000)
        files.append(session, file_id, 0, b"x" * 1_048_576)
    assert list(client.files.list()) == []
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(external_id(file_id, "file"))
    with session_factory.begin() as session:
        assert files.prune(session) == 0
        session.execute(update(File).values(touched_at=datetime.now(UTC) - timedelta(hours=1)))
        assert files.prune(session) == 1


# Validation


def test_a_bad_file_fails_with_the_numbers_of_its_lines(client: openai.OpenAI, work: BatchWork) -> None:
    chat = line(0)["body"]
    batch = create(
        client,
        line(1),
        b"not json\n",
        b"\n",
        line(4, method="GET"),
        line(5, url="/v1/embeddings"),
        line(6, custom_id="line-1"),
        line(7, body=chat | {"stream": True}),
        line(8, body=chat | {"model": "nobody"}),
        line(9, body=chat | {"model": "large"}),
        line(10, body=chat | {"temperature": 9}),
        line(11, body=chat | {"tools": "hammer"}),
        line(12, more=1),
        b'{"custom_id": "' + b"x" * 1_100_000 + b'"}\n',
        b"\xff\xfe\n",
        line(15, custom_id="a\0b"),
    )
    assert batch.status == "validating"
    work.tick()
    batch = client.batches.retrieve(batch.id)
    assert batch.status == "failed"
    assert batch.failed_at
    assert batch.errors is not None
    assert batch.errors.data is not None
    assert {error.line: (error.code, error.param) for error in batch.errors.data} == {
        2: ("invalid_json_line", None),
        4: ("invalid_value", "method"),
        5: ("invalid_url", "url"),
        6: ("duplicate_custom_id", "custom_id"),
        7: ("streaming_unsupported", "body.stream"),
        8: ("model_not_found", "body.model"),
        9: ("invalid_value", "body.model"),
        10: ("invalid_value", "body.temperature"),
        11: ("invalid_value", "body.tools"),
        12: ("invalid_value", "more"),
        13: ("invalid_value", None),
        14: ("invalid_json_line", None),
        15: ("invalid_value", "custom_id"),
    }
    assert batch.request_counts is not None
    assert batch.request_counts.completed == 0


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in line(1).items() if key != name}


GOOD = json.dumps(line(1)).encode()


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"{not json}\n", ("invalid_json_line", None)),
        (b'{"custom_id": "a"', ("invalid_json_line", None)),
        (b'"a string"\n', ("invalid_json_line", None)),
        (b"[1, 2]\n", ("invalid_json_line", None)),
        (b"null\n", ("invalid_json_line", None)),
        (GOOD[:-1] + b', "x": NaN}\n', ("invalid_json_line", None)),
        (GOOD[:-1] + b', "x": ' + b"9" * 5000 + b"}\n", ("invalid_json_line", None)),
        (GOOD + b" " + GOOD + b"\n", ("invalid_json_line", None)),
        (GOOD + b"\r" + GOOD + b"\r", ("invalid_json_line", None)),
        (json.dumps(line(1)).encode("utf-16"), ("invalid_json_line", None)),
        (json.dumps(line(1)).encode("utf-16-be"), ("invalid_json_line", None)),
        (GOOD.replace(b"Number", b"N\xff"), ("invalid_json_line", None)),
        (b"\n" + b"\xef\xbb\xbf" + GOOD, ("invalid_json_line", None)),
        (jsonl({}), ("missing_required_parameter", "custom_id")),
        (jsonl(without("custom_id")), ("missing_required_parameter", "custom_id")),
        (jsonl(without("method")), ("missing_required_parameter", "method")),
        (jsonl(without("url")), ("missing_required_parameter", "url")),
        (jsonl(without("body")), ("missing_required_parameter", "body")),
        (jsonl(line(1, url="/v1/embeddings")), ("invalid_url", "url")),
        (jsonl(line(1, url="http://127.0.0.1/v1/chat/completions")), ("invalid_url", "url")),
        (jsonl(line(1, url=CHAT + "/")), ("invalid_url", "url")),
        (jsonl(line(1, custom_id=7)), ("invalid_value", "custom_id")),
        (jsonl(line(1, custom_id="")), ("invalid_value", "custom_id")),
        (jsonl(line(1, method="post")), ("invalid_value", "method")),
        (jsonl(line(1, body="text")), ("invalid_value", "body")),
        (jsonl(line(1, body=line(1)["body"] | {"stream": True})), ("streaming_unsupported", "body.stream")),
        (jsonl(line(1, body=line(1)["body"] | {"model": "nobody"})), ("model_not_found", "body.model")),
        (GOOD + b"\n" + GOOD, ("duplicate_custom_id", "custom_id")),
        (b"", ("empty_file", None)),
        (b"\xef\xbb\xbf", ("empty_file", None)),
        (b"\r\n \t\n\n", ("empty_file", None)),
    ],
)
def test_a_file_is_refused_with_the_codes_of_openai(
    client: openai.OpenAI, work: BatchWork, content: bytes, found: tuple[str, str | None]
) -> None:
    batch = create(client, content or b"\n")
    work.tick()
    batch = client.batches.retrieve(batch.id)
    assert batch.status == "failed"
    assert batch.errors is not None
    assert batch.errors.data is not None
    error = batch.errors.data[-1]
    assert (error.code, error.param) == found
    assert found[0] == "empty_file" or error.line in (1, 2)


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + jsonl(line(1), line(2)),
        b"\xef\xbb\xbf\r\n" + jsonl(line(1), line(2)),
        jsonl(line(1), line(2)).replace(b"\n", b"\r\n"),
        b"\n\n" + jsonl(line(1), b" \n", line(2)).strip(),
        json.dumps(line(1) | {"custom_id": "\u2028\x85"}, ensure_ascii=False).encode() + b"\n" + jsonl(line(2)),
        jsonl(line(1), line(2, body=line(2)["body"] | {"stream": False})),
    ],
    ids=["mark", "mark and blank line", "windows", "blank lines", "separators of unicode", "no stream"],
)
def test_what_programs_write_around_lines_is_no_part_of_them(
    client: openai.OpenAI,
    work: BatchWork,
    hand_worker: HandWorker,
    session_factory: sessionmaker[Session],
    content: bytes,
) -> None:
    batch = create(client, content)
    work.tick()
    run_all(session_factory, work, hand_worker)
    work.tick()
    batch = client.batches.retrieve(batch.id)
    assert (batch.status, batch.errors) == ("completed", None)
    assert len(read_lines(client, batch.output_file_id)) == 2


@pytest.mark.parametrize("status", ["completed", "failed", "expired"])
def test_a_batch_that_has_ended_cannot_be_cancelled(
    client: openai.OpenAI, work: BatchWork, session_factory: sessionmaker[Session], status: str
) -> None:
    batch = create(client, line(1))
    with session_factory.begin() as session:
        session.execute(update(Batch).values(status=status))
    with pytest.raises(openai.ConflictError, match=f"Cannot cancel a batch with status '{status}'") as refused:
        client.batches.cancel(batch.id)
    assert refused.value.response.headers["x-should-retry"] == "false"
    assert client.batches.retrieve(batch.id).status == status


def test_the_errors_of_a_bad_file_are_bounded(client: openai.OpenAI, work: BatchWork) -> None:
    batch = create(client, *[b"{}\n"] * 3000)
    work.tick()
    batch = client.batches.retrieve(batch.id)
    assert batch.errors is not None
    assert batch.errors.data is not None
    assert [error.line for error in batch.errors.data] == list(range(1, 51))


def test_an_empty_file_fails(client: openai.OpenAI, work: BatchWork) -> None:
    batch = create(client, b"\n\n  \n")
    work.tick()
    batch = client.batches.retrieve(batch.id)
    assert batch.errors is not None
    assert batch.errors.data is not None
    assert [error.code for error in batch.errors.data] == ["empty_file"]


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"completion_window": "30m"}, "completion_window"),
        ({"completion_window": "8d"}, "completion_window"),
        ({"endpoint": "/v1/images"}, "endpoint"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, "output_expires_after.seconds"),
        ({"extra_body": {"colour": "red"}}, "colour"),
    ],
)
def test_a_batch_is_refused_by_the_field_at_fault(client: openai.OpenAI, changes: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        create(client, line(1), **changes)
    assert refused.value.param == param


# Running


def run_all(sessions: sessionmaker[Session], work: BatchWork, worker: HandWorker, *, limit: int | None = None) -> int:
    """Do what a worker would with the jobs that are queued; returns how many."""
    with sessions() as session:
        queued = [external_id(row.id) for row in session.query(Job).filter(Job.status == "queued").order_by(Job.id)]
    for job_id in queued[:limit]:
        worker.run(job_id, f"answer to {job_id}")
    work.tick()
    return len(queued[:limit])


def test_a_batch_runs_and_its_lines_can_be_read_while_it_does(
    client: openai.OpenAI, work: BatchWork, hand_worker: HandWorker, session_factory: sessionmaker[Session]
) -> None:
    batch = create(client, *map(line, range(10)), metadata={"who": "me"}, completion_window="2d")
    work.tick()
    batch = client.batches.retrieve(batch.id)
    assert (batch.status, batch.model, batch.metadata) == ("in_progress", "fake", {"who": "me"})
    assert batch.expires_at is not None
    assert batch.expires_at - batch.created_at == pytest.approx(2 * 86_400, abs=SECONDS)
    assert run_all(session_factory, work, hand_worker, limit=4) == 4
    live = read_lines(client, client.batches.retrieve(batch.id).output_file_id)
    assert len(live) == 4
    assert client.files.content(client.batches.retrieve(batch.id).error_file_id or "").text == ""
    with pytest.raises(openai.BadRequestError, match="unfinished batch"):
        client.files.delete(batch.input_file_id)
    run_all(session_factory, work, hand_worker)
    work.tick()
    batch = client.batches.retrieve(batch.id)
    assert batch.status == "completed"
    assert batch.completed_at
    assert batch.error_file_id is None
    assert batch.request_counts is not None
    assert batch.request_counts.model_dump() == {"total": 10, "completed": 10, "failed": 0}
    written = read_lines(client, batch.output_file_id)
    assert [one["custom_id"] for one in written] == [f"line-{number}" for number in range(10)]
    assert [one for one in written if one in live] == live
    body = written[0]["response"]["body"]
    assert written[0]["response"]["status_code"] == 200
    assert written[0]["error"] is None
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"]["content"] == f"answer to {written[0]['response']['request_id']}"
    assert batch.usage is not None
    assert batch.usage.input_tokens == sum(one["response"]["body"]["usage"]["prompt_tokens"] for one in written)
    assert batch.output_file_id is not None
    file = client.files.retrieve(batch.output_file_id)
    assert file.bytes == len(client.files.content(file.id).content)
    assert file.purpose == "batch_output"
    client.files.delete(batch.input_file_id)


def test_output_is_put_together_over_the_ends_of_pieces(
    client: openai.OpenAI, work: BatchWork, hand_worker: HandWorker, session_factory: sessionmaker[Session]
) -> None:
    batch = create(client, *map(line, range(120)))
    work.tick()
    answer = "word " * 4_000
    for job_id in job_ids(session_factory):
        hand_worker.run(job_id, answer)
    work.tick()
    batch = client.batches.retrieve(batch.id)
    assert batch.status == "completed"
    written = read_lines(client, batch.output_file_id)
    assert [one["custom_id"] for one in written] == [f"line-{number}" for number in range(120)]
    assert {one["response"]["body"]["choices"][0]["message"]["content"] for one in written} == {answer}
    assert client.files.retrieve(batch.output_file_id or "").bytes > 2 * 1_048_576


def test_the_jobs_of_a_batch_are_kept_until_it_is_written(
    client: openai.OpenAI, work: BatchWork, hand_worker: HandWorker, session_factory: sessionmaker[Session]
) -> None:
    create(client, line(1), line(2))
    work.tick()
    run_all(session_factory, work, hand_worker, limit=1)
    far, near = datetime.now(UTC) + timedelta(days=365), datetime.now(UTC) + timedelta(days=2)
    with session_factory() as session:
        assert [job.prune_at > far for job in session.query(Job) if job.prune_at] == [True]
    run_all(session_factory, work, hand_worker)
    work.tick()
    with session_factory() as session:
        assert [job.prune_at < near for job in session.query(Job) if job.prune_at] == [True, True]


def test_lines_that_cannot_run_and_lines_that_fail_are_in_the_error_file(
    client: openai.OpenAI, work: BatchWork, hand_worker: HandWorker, session_factory: sessionmaker[Session]
) -> None:
    from domain.jobs import JobError, JobStatus

    long = line(1)["body"] | {"messages": [{"role": "user", "content": "x" * 200}]}
    batch = create(client, line(1), line(2, body=long), line(3))
    work.tick()
    first, second = job_ids(session_factory)
    error = JobError(code="engine_error", message="it broke")
    hand_worker.finish(hand_worker.claim(first), status=JobStatus.FAILED, error=error)
    hand_worker.run(second, "fine")
    work.tick()
    work.tick()
    batch = client.batches.retrieve(batch.id)
    assert batch.request_counts is not None
    assert batch.request_counts.model_dump() == {"total": 3, "completed": 1, "failed": 2}
    errors = {one["custom_id"]: one["response"] for one in read_lines(client, batch.error_file_id)}
    assert {name: response["status_code"] for name, response in errors.items()} == {
        "line-2": 400,
        **{name: 500 for name in errors if name != "line-2"},
    }
    assert errors["line-2"]["body"]["error"]["code"] == "context_length_exceeded"
    [failed] = [response for name, response in errors.items() if name != "line-2"]
    assert failed["body"]["error"]["code"] == "engine_error"


def test_a_cancelled_batch_keeps_what_was_done(
    client: openai.OpenAI, work: BatchWork, hand_worker: HandWorker, session_factory: sessionmaker[Session]
) -> None:
    batch = create(client, *map(line, range(6)))
    work.tick()
    run_all(session_factory, work, hand_worker, limit=2)
    running = hand_worker.claim(job_ids(session_factory)[2])
    assert client.batches.cancel(batch.id).status == "cancelling"
    assert client.batches.cancel(batch.id).status == "cancelling"
    work.tick()
    assert client.batches.retrieve(batch.id).status == "cancelling"
    with session_factory.begin() as session:
        [held] = jobs.renew(session, [running.id], owner=hand_worker.owner, lease_seconds=60)
    assert held.is_cancel_requested
    from domain.jobs import JobStatus

    hand_worker.finish(running, status=JobStatus.CANCELLED)
    work.tick()
    work.tick()
    batch = client.batches.retrieve(batch.id)
    assert batch.status == "cancelled"
    assert batch.cancelled_at
    assert len(read_lines(client, batch.output_file_id)) == 2
    errors = read_lines(client, batch.error_file_id)
    assert [one["error"]["code"] for one in errors] == ["batch_cancelled"] * 4
    assert client.batches.cancel(batch.id).status == "cancelled"


def test_a_batch_cancelled_before_it_is_read_runs_nothing(
    client: openai.OpenAI, work: BatchWork, session_factory: sessionmaker[Session]
) -> None:
    batch = create(client, line(1))
    client.batches.cancel(batch.id)
    work.tick()
    assert client.batches.retrieve(batch.id).status == "cancelled"
    assert job_ids(session_factory) == []


def test_a_batch_whose_window_closes_expires_with_what_was_done(
    client: openai.OpenAI, work: BatchWork, hand_worker: HandWorker, session_factory: sessionmaker[Session]
) -> None:
    batch = create(client, *map(line, range(5)))
    work.tick()
    run_all(session_factory, work, hand_worker, limit=2)
    over = datetime.now(UTC) - timedelta(seconds=1)
    with session_factory.begin() as session:
        session.execute(update(Batch).values(expires_at=over))
        session.execute(update(Job).where(Job.status == "queued").values(deadline_at=over))
        assert len(jobs.expire(session)) == 3
    work.tick()
    work.tick()
    batch = client.batches.retrieve(batch.id)
    assert batch.status == "expired"
    assert batch.expired_at
    assert len(read_lines(client, batch.output_file_id)) == 2
    assert [one["error"]["code"] for one in read_lines(client, batch.error_file_id)] == ["batch_expired"] * 3


@pytest.mark.parametrize("settings_changes", [{"batch_jobs_in_flight": 4}])
def test_lines_are_fed_in_bounded_waves_each_once(
    client: openai.OpenAI, work: BatchWork, hand_worker: HandWorker, session_factory: sessionmaker[Session]
) -> None:
    batch = create(client, *map(line, range(10)))
    work.tick()
    work.tick()
    assert len(job_ids(session_factory)) == 4
    while run_all(session_factory, work, hand_worker):
        with session_factory() as session:
            assert session.query(Job).filter(Job.status == "queued").count() <= 4
    work.tick()
    assert len(job_ids(session_factory)) == 10
    written = read_lines(client, client.batches.retrieve(batch.id).output_file_id)
    assert sorted(one["custom_id"] for one in written) == sorted(f"line-{number}" for number in range(10))


def test_a_step_that_is_cut_off_was_not_taken(
    client: openai.OpenAI, work: BatchWork, session_factory: sessionmaker[Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As kill -9 does between the accept and the note at the lines: the transaction is gone with both."""
    from storage import batch_lines

    create(client, *map(line, range(3)))
    with monkeypatch.context() as broken:
        broken.setattr(batch_lines, "attach_jobs", lambda *_: 1 / 0)
        work.tick()
    assert job_ids(session_factory) == []
    work.tick()
    assert len(job_ids(session_factory)) == 3


def test_lines_that_begin_alike_run_one_after_another(
    client: openai.OpenAI, work: BatchWork, session_factory: sessionmaker[Session]
) -> None:
    def with_system(number: int) -> dict[str, Any]:
        system = {"role": "system", "content": f"You are {number % 2}"}
        return line(number, body=line(number)["body"] | {"messages": [system, {"role": "user", "content": "Hi"}]})

    create(client, *map(with_system, range(8)))
    work.tick()
    with session_factory() as session:
        ordered = session.scalars(
            text("""SELECT (p.request->'messages'->0->>'content') FROM jobs j JOIN job_payloads p ON p.job_id = j.id
                ORDER BY j.available_at, j.id""")
        ).all()
    assert sum(one != other for one, other in itertools.pairwise(ordered)) == 1


# Whose, and in which order


def test_files_and_batches_of_others_are_unknown(
    api: ApiServer,
    client: openai.OpenAI,
    make_tenant: Callable[..., Tenant],
    session_factory: sessionmaker[Session],
) -> None:
    batch = create(client, line(1))
    stranger = make_tenant()
    with session_factory.begin() as session:
        session.execute(update(Batch).values(tenant_id=stranger.id))
        session.execute(update(File).values(tenant_id=stranger.id))
    unknown_file, unknown_batch = "file-" + "0" * 26, "batch_" + "0" * 26
    calls: list[tuple[Callable[[str], Any], str, str]] = [
        (client.files.retrieve, batch.input_file_id, unknown_file),
        (client.files.content, batch.input_file_id, unknown_file),
        (client.files.delete, batch.input_file_id, unknown_file),
        (client.batches.retrieve, batch.id, unknown_batch),
        (client.batches.cancel, batch.id, unknown_batch),
        (
            lambda id_: client.batches.create(input_file_id=id_, endpoint=CHAT, completion_window="24h"),
            batch.input_file_id,
            unknown_file,
        ),
    ]
    for call, theirs, unknown in calls:
        answers = []
        for id_ in (theirs, unknown):
            with pytest.raises(openai.NotFoundError) as refused:
                call(id_)
            answers.append(
                (
                    refused.value.code,
                    refused.value.message.replace(id_, "ID").replace(str(refused.value.request_id), ""),
                )
            )
        assert answers[0] == answers[1]
    assert list(client.batches.list()) == []
    assert list(client.files.list()) == []


def test_batches_are_listed_page_by_page(client: openai.OpenAI) -> None:
    ids = [create(client, line(number)).id for number in range(5)]
    assert [batch.id for batch in client.batches.list(limit=2)] == ids[::-1]
    with pytest.raises(openai.BadRequestError) as refused:
        client.batches.list(after="nonsense")
    assert refused.value.code == "invalid_cursor"


def test_a_retried_create_makes_one_batch(client: openai.OpenAI, http: httpx.Client) -> None:
    file = upload(client, jsonl(line(1)))
    body = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h"}
    first = http.post("/v1/batches", json=body, headers={"x-stainless-retry-count": "0"}).json()
    again = http.post("/v1/batches", json=body, headers={"x-stainless-retry-count": "1"}).json()
    assert again["id"] == first["id"]
    meant = http.post("/v1/batches", json=body, headers={"x-stainless-retry-count": "0"}).json()
    assert meant["id"] != first["id"]


def test_webhooks_hear_of_the_end(
    client: openai.OpenAI, work: BatchWork, session_factory: sessionmaker[Session]
) -> None:
    from storage.tables import DEFAULT_TENANT_ID
    from storage.webhooks import WebhookDelivery, WebhookEndpoint

    with session_factory.begin() as session:
        session.add(
            WebhookEndpoint(
                id=parse_id_of_other("wh_" + "0" * 26, "wh"),
                tenant_id=DEFAULT_TENANT_ID,
                name="",
                url="https://example.com/",
                event_types=["batch.failed"],
                secret="s",
            )
        )
    batch = create(client, b"{}\n")
    work.tick()
    with session_factory() as session:
        [delivery] = session.query(WebhookDelivery)
        assert (delivery.type, external_id(delivery.event_id, "batch")) == ("batch.failed", batch.id)


def test_lines_may_be_completions_with_one_prompt_each(
    client: openai.OpenAI, work: BatchWork, hand_worker: HandWorker, session_factory: sessionmaker[Session]
) -> None:
    url: Any = "/v1/completions"
    body = {"model": "fake", "prompt": "Once", "max_tokens": 4}
    batch = create(client, line(1, url=url, body=body), endpoint=url)
    several = create(client, line(1, url=url, body=body | {"prompt": ["Once", "Twice"]}), endpoint=url)
    work.tick()
    errors = client.batches.retrieve(several.id).errors
    assert errors is not None
    assert errors.data is not None
    assert [(error.code, error.param) for error in errors.data] == [("unsupported_parameter", "body.prompt")]
    run_all(session_factory, work, hand_worker)
    work.tick()
    [written] = read_lines(client, client.batches.retrieve(batch.id).output_file_id)
    assert written["response"]["body"]["object"] == "text_completion"
    assert written["response"]["body"]["choices"][0]["text"].startswith("answer to")


def test_lines_may_be_responses_that_need_nobody_to_watch(
    client: openai.OpenAI, work: BatchWork, hand_worker: HandWorker, session_factory: sessionmaker[Session]
) -> None:
    url: Any = "/v1/responses"
    body = {"model": "fake", "input": "Once", "max_output_tokens": 4}
    batch = create(client, line(1, url=url, body=body), endpoint=url)
    for field, value in {"background": True, "previous_response_id": "resp_1"}.items():
        refused = create(client, line(1, url=url, body=body | {field: value}), endpoint=url)
        work.tick()
        errors = client.batches.retrieve(refused.id).errors
        assert errors is not None
        assert errors.data is not None
        assert [(error.code, error.param) for error in errors.data] == [("unsupported_parameter", f"body.{field}")]
    run_all(session_factory, work, hand_worker)
    work.tick()
    [written] = read_lines(client, client.batches.retrieve(batch.id).output_file_id)
    response = Response.model_validate(written["response"]["body"])
    assert response.output_text.startswith("answer to")
