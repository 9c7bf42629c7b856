"""`celeriac doctor` on a real database and a real Redis: each trouble is named, with what to do."""

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch
from uuid import uuid4

import pytest
import redis
from click.testing import CliRunner
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session, sessionmaker

from celeriac import cli
from celeriac.examination.broker import KEY_BY_PATTERN
from celeriac.examination.results import clock_result
from domain.jobs import WorkerState
from local.servers import SUPERUSER, EmbeddedRedis
from settings import ROOT, get_settings
from storage import maintenance, processes, workers
from storage.processes import ProcessKind, ProcessReport
from storage.workers import WorkerReport
from tests.databases import as_role

MODEL = "celeriac-mini"

Doctor = Callable[..., dict[str, Any]]


@pytest.fixture
def doctor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, database_url: str, redis_url: str) -> Iterator[Doctor]:
    """Runs `celeriac doctor --json` and returns its answer with its `exit_code`."""
    settings = {"DATA_DIR": str(tmp_path), "DATABASE_URL": database_url, "REDIS_URL": redis_url}

    def run(**others: str) -> dict[str, Any]:
        for name, value in (settings | others).items():
            monkeypatch.setenv(f"CELERIAC_{name}", value)
        get_settings.cache_clear()
        with patch.dict(os.environ):
            outcome = CliRunner().invoke(cli.main, ["doctor", "--json"])
        return {**json.loads(outcome.stdout), "exit_code": outcome.exit_code}

    yield run
    get_settings.cache_clear()


@pytest.fixture
def well(session_factory: sessionmaker[Session]) -> None:
    """A worker is alive, and maintenance ticks."""
    report = WorkerReport(id=uuid4(), hostname="w1", model=MODEL, max_num_seqs=4, num_running=0, tokens_per_second=9.0)
    with session_factory.begin() as session:
        workers.heartbeat(session, report)
        maintenance.record_ticks(session, dict.fromkeys(("janitor", "batches", "webhooks"), 0.0))


def found(answer: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [check for check in answer["checks"] if check["name"] == name]


@pytest.mark.usefixtures("well")
def test_where_all_is_well_nothing_fails(doctor: Doctor) -> None:
    answer = doctor(AUTH="api_key")
    assert [check for check in answer["checks"] if check["level"] == "fail"] == []
    levels = {check["name"]: check["level"] for check in answer["checks"]}
    for name in ("schema", "workers", "maintenance", "Redis", "permissions", "clock of the database", "models"):
        assert levels[name] == "ok", answer
    [about] = found(answer, "workers")
    assert "1 ready" in about["seen"]


@pytest.mark.usefixtures("well")
def test_a_role_from_which_postgresql_hides_nothing_is_named(doctor: Doctor, database_url: str) -> None:
    [about] = found(doctor(AUTH="api_key", DATABASE_URL=as_role(SUPERUSER, database_url)), "row-level security")
    assert (about["level"], about["seen"]) == ("warn", "it is not in force: postgres is a superuser")
    assert found(doctor(AUTH="none"), "row-level security") == []  # there is only one tenant
    [about] = found(doctor(AUTH="api_key"), "row-level security")
    assert about["level"] == "ok"


def test_each_process_that_is_missing_is_named_with_its_command(doctor: Doctor, make_job: Any) -> None:
    make_job(model="other")
    answer = doctor()
    assert (answer["status"], answer["exit_code"]) == ("fail", 2)
    assert found(answer, "maintenance")[0]["remedy"].endswith("celeriac maintenance")
    none, other = found(answer, "workers")
    assert none["remedy"].endswith("celeriac worker")
    assert (other["level"], "other" in other["seen"], "1 jobs wait" in other["seen"]) == ("fail", True, True)


@pytest.mark.parametrize(
    ("change", "level", "says", "remedy"),
    [
        ("UPDATE alembic_version SET version_num = '0003'", "fail", "it is at 0003", "celeriac migrate"),
        ("UPDATE alembic_version SET version_num = '9999'", "warn", "9999 is newer", "upgrade"),
        ("DROP TABLE alembic_version", "fail", "there is none", "celeriac migrate"),
    ],
)
def test_a_schema_of_another_release_is_named(
    doctor: Doctor, database: Engine, change: str, level: str, says: str, remedy: str
) -> None:
    with database.begin() as connection:
        connection.execute(text("CREATE TABLE kept AS SELECT * FROM alembic_version"))
        connection.execute(text(change))
    try:
        [schema] = found(doctor(), "schema")
    finally:
        with database.begin() as connection:
            connection.execute(text("DROP TABLE IF EXISTS alembic_version"))
            connection.execute(text("ALTER TABLE kept RENAME TO alembic_version"))
    assert schema["level"] == level
    assert says in schema["seen"]
    assert remedy in schema["remedy"]


@pytest.mark.usefixtures("well")
def test_workers_that_take_no_jobs_are_named_with_the_reason(
    doctor: Doctor, session_factory: sessionmaker[Session]
) -> None:
    with session_factory.begin() as session:
        workers.drain(session, "w1", release_after_seconds=1)
    [drained] = found(doctor(), "workers")
    assert (drained["level"], "1 drained" in drained["seen"]) == ("warn", True)
    with session_factory.begin() as session:
        workers.resume(session, "w1")
        loading = WorkerReport(uuid4(), "w2", "big", 4, 0, 0.0, state=WorkerState.LOADING, load_percent=3)
        workers.heartbeat(session, loading)
    [big, ready] = found(doctor(), "workers")
    assert (big["level"], "1 loading" in big["seen"], ready["level"]) == ("warn", True, "ok")


@pytest.mark.usefixtures("well")
def test_processes_are_named_with_what_they_tell_and_with_another_release(
    doctor: Doctor, session_factory: sessionmaker[Session]
) -> None:
    troubled = WorkerReport(uuid4(), "w2", "tiny", 4, 0, 0.0, troubles={"engine_ended": "its engine has ended: killed"})
    report = ProcessReport(uuid4(), ProcessKind.MAINTENANCE, "maintenance 7 on here", "0.0.1")
    with session_factory.begin() as session:
        workers.heartbeat(session, troubled)
        processes.beat(session, report, {"archive_failed": "the archive at s3://b cannot be used"})
    answer = doctor()
    assert "w2 (tiny): its engine has ended: killed" in [check["seen"] for check in found(answer, "workers")]
    seen = [check["seen"] for check in found(answer, "processes")]
    assert "maintenance 7 on here: the archive at s3://b cannot be used" in seen
    assert any(one.startswith("maintenance 7 on here has run 0.0.1 since 20") for one in seen)


@pytest.mark.usefixtures("well")
def test_a_worker_of_another_release_is_named_with_its_start(
    doctor: Doctor, session_factory: sessionmaker[Session]
) -> None:
    old = WorkerReport(uuid4(), "w2", "tiny", 4, 0, 0.0, release="0.0.1")
    with session_factory.begin() as session:
        workers.heartbeat(session, old)
        session.execute(text("UPDATE workers SET started_at = '2026-01-02 03:04Z' WHERE hostname = 'w2'"))
    warned = [check for check in found(doctor(), "workers") if check["level"] != "ok"]
    [about] = warned
    assert about["seen"].startswith("w2 (tiny) has run 0.0.1 since 2026-01-02 03:04 UTC, and this is ")
    assert about["remedy"].startswith("restart it")
    with session_factory.begin() as session:
        session.execute(text("UPDATE workers SET release = NULL WHERE hostname = 'w2'"))
    assert any("w2 (tiny) has run an older release since" in check["seen"] for check in found(doctor(), "workers"))


def test_servers_that_do_not_answer_are_named(doctor: Doctor) -> None:
    answer = doctor(DATABASE_URL="postgresql://me:s3cret@127.0.0.1:9/x", REDIS_URL="redis://:s3cret@127.0.0.1:9")
    assert answer["exit_code"] == 2
    assert "CELERIAC_DATABASE_URL" in found(answer, "database")[0]["remedy"]
    assert "CELERIAC_REDIS_URL" in found(answer, "Redis")[0]["remedy"]
    assert "s3cret" not in json.dumps(answer)


def test_a_setting_that_cannot_be_read_is_named(doctor: Doctor) -> None:
    answer = doctor(PORT="x")
    [setting] = found(answer, "settings")
    assert (setting["level"], "CELERIAC_PORT is 'x'" in setting["seen"], answer["exit_code"]) == ("fail", True, 2)


def test_a_redis_that_forgets_or_refuses_is_named(doctor: Doctor, redis_server: EmbeddedRedis, redis_url: str) -> None:
    address = redis_url.rpartition("@")[2]
    with redis.Redis.from_url(redis_url) as admin:
        rules = ["on", ">pw", "+@all", "-@admin", "-@dangerous", "+info", "~celeriac.*", "resetchannels"]
        admin.execute_command("ACL", "SETUSER", "doctored", *rules)
        admin.config_set("maxmemory-policy", "allkeys-lru")
        try:
            answer = doctor(REDIS_URL=f"redis://doctored:pw@{address}")
            wrong = doctor(REDIS_URL=f"redis://doctored:no@{address}")
        finally:
            admin.config_set("maxmemory-policy", "noeviction")
            admin.execute_command("ACL", "DELUSER", "doctored")
    [memory] = found(answer, "memory of Redis")
    assert (memory["level"], "noeviction" in memory["remedy"]) == ("warn", True)
    [permissions] = found(answer, "permissions")
    for name in ("unacked*", "*.pidbox*", "publishing", "patterns of channels"):
        assert name in permissions["seen"], permissions
    assert "the keys celeriac.*" not in permissions["seen"]
    assert "invalid username-password" in found(wrong, "Redis")[0]["seen"]


def test_every_name_of_the_documented_acl_is_tried() -> None:
    [line] = re.findall(r"^ACL SETUSER celeriac (.+)$", (ROOT / "docs/operations.md").read_text(), re.MULTILINE)
    assert {word[1:] for word in line.split() if word.startswith("~")} == set(KEY_BY_PATTERN)


def test_a_model_without_its_files_is_named(doctor: Doctor, tmp_path: Path) -> None:
    (tmp_path / "models.toml").write_text('[[models]]\nid = "m"\npath = "/nowhere/at/all"\n')
    first, none = found(doctor(MODELS_FILE=str(tmp_path / "models.toml")), "models")
    assert "m is unavailable" in first["seen"]
    assert (none["level"], "celeriac models pull" in none["remedy"]) == ("fail", True)


def test_settings_of_development_are_named(doctor: Doctor) -> None:
    answer = doctor(ALLOWED_HOSTS="llm.lan", WEBHOOK_PRIVATE_TARGETS="true", LOG_LEVEL="DEBUG")
    seen = " ".join(check["seen"] for check in found(answer, "settings") if check["level"] == "warn")
    for name in ("CELERIAC_ALLOWED_HOSTS", "CELERIAC_WEBHOOK_PRIVATE_TARGETS", "CELERIAC_LOG_LEVEL"):
        assert name in seen


@pytest.mark.parametrize(
    ("server_time", "level", "says"),
    [(100.2, "ok", "agrees"), (104.0, "warn", "3.0 s ahead"), (97.0, "warn", "3.0 s behind"), (101.9, "ok", "agrees")],
)
def test_a_clock_is_judged_by_what_the_trip_cannot_explain(server_time: float, level: str, says: str) -> None:
    result = clock_result("clock", server_time, asked_at=100.0, answered_at=101.0, remedy="run NTP")
    assert (result.level, says in result.seen) == (level, True)
