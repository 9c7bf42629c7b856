"""`celeriac tenants erase`: nothing that one user has asked for and got is left in any table, and all of others is."""

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest
from click.testing import CliRunner
from sqlalchemy import Engine, select, text, update
from sqlalchemy.orm import Session, sessionmaker

from celeriac import cli
from domain.jobs import BatchStatus, JobStatus, external_id
from domain.requests import GenerationRequest, TokenChunk
from maintenance.erasing import Eraser
from settings import Settings, get_settings
from storage import administration, batches, conversations, erasure, erasures
from storage.erasure import Person
from storage.erasures import Erasure
from storage.files import Batch
from storage.tables import DEFAULT_TENANT_ID, Job, JobChunk, JobPayload, JobResult, KnownAnswer
from storage.webhooks import WebhookDelivery
from tests.conftest import MakeJob
from tests.integration.api_harness import ApiServer
from tests.storage_samples import result

TABLES = "SELECT relname FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace"
Erase = Callable[..., dict[str, Any]]


@pytest.fixture
def erase(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, database_url: str) -> Iterator[Erase]:
    """`celeriac tenants erase default ...`, and its JSON."""
    monkeypatch.setenv("CELERIAC_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("CELERIAC_DATABASE_URL", database_url)
    get_settings.cache_clear()

    def run(*arguments: str) -> dict[str, Any]:
        done = CliRunner().invoke(cli.main, ["tenants", "erase", "default", *arguments, "--yes", "--json"])
        assert done.exit_code == 0, done.output
        return dict(json.loads(done.stdout))

    yield run
    get_settings.cache_clear()


@pytest.fixture
def settings(database_url: str, redis_url: str) -> Settings:
    return Settings(database_url=database_url, redis_url=redis_url)


@pytest.fixture
def store(session_factory: sessionmaker[Session], make_job: MakeJob) -> Callable[[str], UUID]:
    """All that a user can leave behind, with the user's name in every text: jobs that have ended and that run, a batch,
    a conversation, a delivery, an answer. Returns the id of the batch."""

    def store(user: str) -> UUID:
        owned: dict[str, Any] = {"job_metadata": {"user": user}, "key_id": f"key{user}"}
        request = GenerationRequest(model="test-model", prompt=f"the question of {user}")
        ended = make_job(status=JobStatus.COMPLETED, request=request, webhook_url=f"https://{user}.example/", **owned)
        make_job(status=JobStatus.IN_PROGRESS, request=request, **owned)
        make_job(request=request, **owned)
        chunk = TokenChunk(sequence_number=1, index=0, text=f"the answer for {user}", token_ids=(1,))
        said = result(1).model_dump(mode="json")
        said["choices"][0]["text"] = f"the answer for {user}"
        with session_factory.begin() as session:
            session.execute(
                update(JobPayload).values(endpoint_body={"input": user}).where(JobPayload.job_id == ended.id)
            )
            session.add(JobChunk(job_id=ended.id, sequence_number=1, attempt=1, chunk=chunk))
            session.add(JobResult(job_id=ended.id, attempt=1, result=type(result(1)).model_validate(said)))
            answer = {"key": user.encode(), "job_id": ended.id, "created_at": ended.created_at}
            session.add(KnownAnswer(tenant_id=DEFAULT_TENANT_ID, **answer))
            url = f"https://{user}.example/"
            session.add(WebhookDelivery(tenant_id=DEFAULT_TENANT_ID, event_id=ended.id, type="job.completed", url=url))
            items = [{"id": f"msg_{user}", "type": "message", "text": user}]
            conversations.create(
                session, DEFAULT_TENANT_ID, metadata={"user": user}, items=items, ttl_seconds=60, max_bytes=2**20
            )
            return batches.create_with_file(
                session, DEFAULT_TENANT_ID, f"the line of {user}".encode(), file_name=f"{user}.jsonl", max_bytes=2**20,
                endpoint="/v1/completions", completion_window="24h", window_seconds=60, metadata={"user": user},
                ttl_seconds=60, key_id=f"key{user}",
            ).id  # fmt: skip

    return store


def traces(session: Session, user: str) -> dict[str, int]:
    """By table, how many rows contain the name."""
    count = "SELECT count(*) FROM {0} WHERE {0}::text LIKE :name OR {0}::text LIKE :hex"
    names = {"name": f"%{user}%", "hex": f"%{user.encode().hex()}%"}
    found = {table: session.scalar(text(count.format(table)), names) for table in session.scalars(text(TABLES))}
    return {table: number for table, number in found.items() if number}


def end_batches(session: Session) -> None:
    session.execute(update(Batch).values(status=BatchStatus.COMPLETED))


def test_of_one_user_nothing_is_left_and_of_others_everything(
    erase: Erase, store: Callable[[str], UUID], session_factory: sessionmaker[Session]
) -> None:
    store("alice")
    store("bob")
    with session_factory.begin() as session:
        end_batches(session)
        before = traces(session, "bob")
        assert traces(session, "alice") == before
        assert len(before) > 10, "a user leaves traces in many tables"
    counts = {"jobs": 3, "batches": 1, "conversations": 1}
    erased = erase("--metadata", "user=alice")
    assert erased.items() >= (counts | {"status": "completed", "metadata": "user", "unfinished_batches": 0}).items()
    assert erased["files_to_delete"] == []
    with session_factory.begin() as session:
        left = traces(session, "alice")
        assert left.pop("usage_records") == 2, "counts stay, with the id of the key: of the queued and the running job"
        assert left == {}
        assert traces(session, "bob") == before
        asked, done = session.execute(text("SELECT action, changes FROM audit_log ORDER BY id")).all()
        assert (asked.action, asked.changes) == ("tenant.erase", {"metadata": "user"})
        assert (done.action, done.changes) == ("tenant.erased", counts | {"metadata": "user"})


def test_a_key_identifies_jobs_and_batches_and_running_batches_are_stopped_first(
    erase: Erase, store: Callable[[str], UUID], session_factory: sessionmaker[Session]
) -> None:
    batch_id = store("alice")
    first = erase("--key", "keyalice")
    assert (first["jobs"], first["batches"], first["unfinished_batches"]) == (3, 0, 1)
    with session_factory.begin() as session:
        assert session.get_one(Batch, batch_id).status is BatchStatus.CANCELLING
        end_batches(session)
    again = erase("--key", "keyalice")
    assert again["id"] == first["id"], "it goes on"
    assert (again["jobs"], again["batches"], again["unfinished_batches"]) == (3, 1, 0)
    assert erase("--key", "keyalice")["id"] != first["id"], "which had ended"


def test_files_that_also_contain_lines_of_others_are_named(
    erase: Erase, store: Callable[[str], UUID], session_factory: sessionmaker[Session], make_job: MakeJob
) -> None:
    batch_id = store("bob")
    line_key = f"{external_id(batch_id, 'batch')} 7"
    make_job(status=JobStatus.COMPLETED, job_metadata={"user": "alice"}, idempotency_key=line_key)
    with session_factory() as session:
        file_id = session.get_one(Batch, batch_id).input_file_id
    assert erase("--metadata", "user=alice")["files_to_delete"] == [external_id(file_id, "file")]


def test_a_large_erasure_takes_many_short_steps(
    erase: Erase, make_job: MakeJob, session_factory: sessionmaker[Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(erasure, "MAX_READ", 3)
    monkeypatch.setattr(erasure, "MAX_ERASED", 2)
    for number in range(12):
        make_job(job_metadata={"user": "alice" if number % 4 else "bob"})
    assert erase("--metadata", "user=alice")["jobs"] == 9
    with session_factory() as session:
        assert {row.job_metadata["user"] for row in session.scalars(select(Job))} == {"bob"}


def test_jobs_whose_keys_look_like_those_of_lines_are_erased(
    erase: Erase, make_job: MakeJob, session_factory: sessionmaker[Session]
) -> None:
    for key in ("retry of job_01M8HZ3J0N2TE5F90PYR57PYHP", "mykey 1", "batch_nope 2", "plain", " "):
        make_job(job_metadata={"user": "alice"}, idempotency_key=key)
    assert erase("--metadata", "user=alice")["jobs"] == 5


def test_erasures_take_turns_and_one_that_fails_holds_up_no_other(
    make_job: MakeJob, session_factory: sessionmaker[Session], database: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(erasure, "MAX_READ", 1)
    with session_factory.begin() as session:
        tenant = administration.find_tenant(session, "default")
        ids = [erasures.ask(session, tenant, Person(key_id=key), actor="me").id for key in ("a", "b", "c")]
    with session_factory.begin() as session:
        session.get_one(Erasure, ids[0]).key_id = None  # of nobody: its steps fail
        session.get_one(Erasure, ids[0]).metadata_name = "user"
    make_job(key_id="b")
    make_job(key_id="c")

    def fail(session: Session, tenant_id: UUID, person: Person, *, after: UUID) -> erasure.Step:
        if person.metadata is not None:
            session.execute(text("SET LOCAL statement_timeout = 1"))
            session.execute(text("SELECT pg_sleep(60), 'not to be told'"))
        return erasure.erase_batches(session, tenant_id, person, after=after)

    monkeypatch.setitem(erasures._STEPS, "batches", fail)
    taken = []
    eraser = Eraser(database, None)
    while (found := eraser.take_step()) is not None:
        taken.append(found.id)
    assert set(taken[:3]) == set(ids)
    assert set(taken[3:5]) == set(ids[1:])
    with session_factory() as session:
        first, *others = (session.get_one(Erasure, id_) for id_ in ids)
        assert "OperationalError" in (first.error or "")
        assert "told" not in (first.error or "")
        assert [(other.is_done, other.num_jobs) for other in others] == [(True, 1), (True, 1)]


ERASURES = "/v1/admin/tenants/default/erasures"


def test_an_erasure_asked_for_over_http_is_done_by_maintenance(
    store: Callable[[str], UUID], session_factory: sessionmaker[Session], database: Engine, settings: Settings
) -> None:
    store("alice")
    store("bob")
    with session_factory() as session:
        before = traces(session, "bob")
    eraser = Eraser(database, None)
    with ApiServer(settings) as server, httpx.Client(base_url=server.url) as http:
        asked = http.post(ERASURES, json={"metadata": {"user": "alice"}})
        assert (asked.status_code, asked.json()["status"]) == (202, "running")
        assert http.post(ERASURES, json={"metadata": {"user": "alice"}}).json()["id"] == asked.json()["id"]
        place = f"{ERASURES}/{asked.json()['id']}"
        while eraser.take_step() is not None:
            pass
        stopping = http.get(place).json()
        assert (stopping["status"], stopping["jobs"], stopping["unfinished_batches"]) == ("running", 3, 1)
        with session_factory.begin() as session:
            end_batches(session)
            session.execute(text("UPDATE erasures SET due_at = now()"))
        while eraser.take_step() is not None:
            pass
        done = http.get(place).json()
        assert (done["status"], done["batches"], done["conversations"]) == ("completed", 1, 1)
        assert http.get(ERASURES).json()["data"] == [done]
    with session_factory() as session:
        assert traces(session, "alice").keys() == {"usage_records"}
        assert traces(session, "bob") == before


def test_an_archive_that_is_away_is_tried_again(
    store: Callable[[str], UUID], session_factory: sessionmaker[Session], database: Engine
) -> None:
    with session_factory.begin() as session:
        tenant = administration.find_tenant(session, "default")
        asked = erasures.ask(session, tenant, Person(key_id="x"), actor="me")
        session.flush()
        asked.step = "archive"
    assert Eraser(database, None).take_step() is not None
    with session_factory() as session:
        [left] = session.scalars(select(Erasure))
        assert "CELERIAC_ARCHIVE_URL" in (left.error or "")
        assert not left.is_done
    assert Eraser(database, None).take_step() is None, "until it is due"


def test_who_has_no_archive_leaves_archived_jobs_to_who_has_it(
    erase: Erase, session_factory: sessionmaker[Session], make_job: MakeJob
) -> None:
    make_job(job_metadata={"user": "alice"})
    with session_factory.begin() as session:
        administration.find_tenant(session, "default").archived_at = datetime.now(UTC)
    for _ in range(2):
        left = erase("--metadata", "user=alice")
        assert (left["status"], left["jobs"]) == ("running", 1)
        assert "CELERIAC_ARCHIVE_URL" in left["error"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, None),
        ({"key_id": "a", "metadata": {"b": "c"}}, None),
        ({"metadata": {}}, "metadata"),
        ({"user": 1}, "user"),
    ],
)
def test_a_request_says_whose_and_nothing_else(settings: Settings, body: dict[str, Any], param: str | None) -> None:
    with ApiServer(settings) as server, httpx.Client(base_url=server.url) as http:
        refused = http.post(ERASURES, json=body)
        assert refused.status_code == 400
        assert param is None or refused.json()["error"]["param"] == param
        assert http.post("/v1/admin/tenants/nope/erasures", json={"key_id": "a"}).status_code == 404
        assert http.get(f"{ERASURES}/erasure_nope").status_code == 404


@pytest.mark.parametrize("arguments", [(), ("--metadata", "user"), ("--metadata", "a=b", "--key", "c")])
def test_whose_it_is_must_be_said(arguments: tuple[str, ...]) -> None:
    done = CliRunner().invoke(cli.main, ["tenants", "erase", "default", *arguments], input="y\n")
    assert done.exit_code == 2
    assert "NAME=VALUE" in done.output
    assert "Go on?" not in done.output


def test_it_asks_before_it_erases_and_not_about_a_tenant_that_does_not_exist(erase: Erase) -> None:
    runner, arguments = CliRunner(), ["--metadata", "user=a"]
    unknown = runner.invoke(cli.main, ["tenants", "erase", "nope", *arguments], input="y\n")
    assert unknown.exit_code != 0
    assert "Go on?" not in unknown.output
    refused = runner.invoke(cli.main, ["tenants", "erase", "default", *arguments], input="n\n")
    assert refused.exit_code == 1
    assert "Go on?" in refused.output
    assert "Erased" not in refused.output
    agreed = runner.invoke(cli.main, ["tenants", "erase", "default", *arguments], input="y\n")
    assert "Erased 0 jobs" in agreed.output
