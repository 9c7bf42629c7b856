"""Jobs are in the archive, an S3 bucket, before they are deleted; they are there once, and can be erased from it."""

import gzip
import json
import re
from collections.abc import Callable
from typing import Any

import obstore
import pytest
import redis
from obstore.store import S3Store
from sqlalchemy import Engine, select, text
from sqlalchemy.orm import Session, sessionmaker

from domain.catalog import Catalog
from domain.jobs import JobStatus, external_id
from maintenance.archive import Archive, Archiver, ArchiveUnavailable, erase_archived
from maintenance.janitor import Janitor
from settings import Settings
from storage import archive
from storage.erasure import Person
from storage.tables import DEFAULT_TENANT_ID, Job, JobResult, Tenant
from tests.conftest import MakeJob
from tests.integration.conftest import BUCKET
from tests.storage_samples import result

URL = f"s3://{BUCKET}/old"
MakeDue = Callable[[str], Job]


@pytest.fixture
def make_due(make_job: MakeJob, session_factory: sessionmaker[Session]) -> MakeDue:
    """A completed job of a user, which may be deleted now."""

    def make(user: str) -> Job:
        job = make_job(status=JobStatus.COMPLETED, job_metadata={"user": user}, key_id=f"key{user}")
        with session_factory.begin() as session:
            session.add(JobResult(job_id=job.id, attempt=1, result=result(1)))
            session.execute(text("UPDATE jobs SET prune_at = now() WHERE id = :id"), {"id": job.id})
        return job

    return make


@pytest.fixture
def archiver(database: Engine) -> Archiver:
    return Archiver(database, URL)


def objects(bucket: str) -> dict[str, list[dict[str, Any]]]:
    """The lines of each object, by name."""
    store = S3Store(BUCKET)  # by the AWS_* variables, which lead to `bucket`
    names = [entry["path"] for page in obstore.list(store) for entry in page]
    contents = {name: bytes(obstore.get(store, name).bytes()) for name in names}
    return {name: [json.loads(line) for line in gzip.decompress(body).splitlines()] for name, body in contents.items()}


def stored_ids(session_factory: sessionmaker[Session]) -> set[str]:
    with session_factory() as session:
        return set(map(external_id, session.scalars(select(Job.id))))


def test_a_job_is_archived_whole_and_then_deleted(
    bucket: str, archiver: Archiver, make_due: MakeDue, make_job: MakeJob, session_factory: sessionmaker[Session]
) -> None:
    job, kept = make_due("ann"), make_job(status=JobStatus.COMPLETED)
    archiver.tick()
    assert stored_ids(session_factory) == {external_id(kept.id)}
    [(name, [line])] = objects(bucket).items()
    assert job.finished_at is not None
    day = job.finished_at.date().isoformat()
    assert re.fullmatch(rf"old/{DEFAULT_TENANT_ID}/{day}/{external_id(job.id)}-[0-9a-f]{{12}}\.jsonl\.gz", name)
    assert (line["id"], line["status"], line["metadata"]) == (external_id(job.id), "completed", {"user": "ann"})
    assert line["request"]["prompt"] == "Once upon a time"
    assert line["result"] == result(1).model_dump(mode="json")
    with session_factory() as session:
        assert session.get_one(Tenant, DEFAULT_TENANT_ID).archived_at is not None


def test_whoever_dies_before_it_has_deleted_leaves_the_same_object(
    bucket: str, archiver: Archiver, make_due: MakeDue, session_factory: sessionmaker[Session]
) -> None:
    for _ in range(3):
        make_due("ann")
    with session_factory() as session:
        Archive(URL).write(archive.list_due(session))  # and no further
    before = objects(bucket)
    assert len(stored_ids(session_factory)) == 3
    archiver.tick()
    assert stored_ids(session_factory) == set()
    assert objects(bucket) == before
    assert len(before) == 1


def test_nothing_is_deleted_while_the_archive_is_away(
    bucket: str, archiver: Archiver, make_due: MakeDue, session_factory: sessionmaker[Session], database: Engine
) -> None:
    make_due("ann")
    with pytest.raises(ArchiveUnavailable, match="CELERIAC_ARCHIVE_URL"):
        Archiver(database, "s3://nosuchbucket/old").tick()
    assert len(stored_ids(session_factory)) == 1
    archiver.tick()
    assert stored_ids(session_factory) == set()


def test_one_user_is_erased_from_the_archive(
    bucket: str, archiver: Archiver, make_due: MakeDue, database: Engine
) -> None:
    make_due("ann")
    bob = make_due("bob")
    archiver.tick()
    make_due("ann")
    Archiver(database, URL).tick()
    assert len(objects(bucket)) == 2
    assert erase_archived(database, URL, DEFAULT_TENANT_ID, Person(metadata=("user", "ann"))) == 2
    [[line]] = objects(bucket).values()
    assert line["id"] == external_id(bob.id)
    assert erase_archived(database, URL, DEFAULT_TENANT_ID, Person(key_id="keybob")) == 1
    assert objects(bucket) == {}


def test_where_there_is_an_archive_the_janitor_deletes_no_jobs(
    make_due: MakeDue, session_factory: sessionmaker[Session], redis_url: str
) -> None:
    make_due("ann")
    with redis.Redis.from_url(redis_url) as client:
        Janitor(session_factory, client, Catalog(()), Settings(archive_url=URL)).tick()
        assert len(stored_ids(session_factory)) == 1
        Janitor(session_factory, client, Catalog(()), Settings()).tick()
    assert stored_ids(session_factory) == set()


@pytest.mark.parametrize("wait_seconds", [0, 1])
def test_whoever_holds_the_lock_keeps_no_table_from_being_vacuumed(database: Engine, wait_seconds: int) -> None:
    """Not even once its connection has prepared all statements. An erasure takes hours."""
    holder = text(
        "SELECT backend_xmin::text FROM pg_stat_activity JOIN pg_locks USING (pid)"
        " WHERE locktype = 'advisory' AND granted AND datname = current_database()"
    )
    for _ in range(8):
        with archive.archive_lock(database, wait_seconds=wait_seconds) as is_taken, database.connect() as other:
            assert is_taken
            assert list(other.scalars(holder)) == [None]


def test_only_one_process_at_a_time_writes_to_the_archive(database: Engine) -> None:
    with (
        archive.archive_lock(database) as first,
        archive.archive_lock(database) as second,
    ):
        assert (first, second) == (True, False)
    with archive.archive_lock(database, wait_seconds=1) as third:
        assert third
