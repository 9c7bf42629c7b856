"""`celeriac migrate` and `celeriac keys` on a real database."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from sqlalchemy import Engine

from celeriac import cli
from settings import get_settings
from storage import tenants
from storage.database import open_database, session_factory
from storage.tables import DEFAULT_TENANT_ID


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    def invoke(database_url: str, *arguments: str, **environment: str) -> Any:
        monkeypatch.setenv("CELERIAC_DATA_DIR", str(tmp_path))
        monkeypatch.setenv("CELERIAC_DATABASE_URL", database_url)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        get_settings.cache_clear()
        return CliRunner().invoke(cli.main, list(arguments))

    yield invoke
    get_settings.cache_clear()


def test_migrate_puts_schema_and_bootstrap_key_in_place_however_often(run: Any, empty_database_url: str) -> None:
    key = "sk_admin_" + "s" * 32
    for _ in range(2):
        result = run(empty_database_url, "migrate", CELERIAC_BOOTSTRAP_API_KEY=key)
        assert result.exit_code == 0, result.output
    database = open_database(empty_database_url)
    with session_factory(database)() as session:
        row = tenants.resolve_key(session, key)
    database.dispose()
    assert row is not None
    assert row.tenant_id == DEFAULT_TENANT_ID


def test_migrate_does_not_revive_a_bootstrap_key_that_was_disabled(run: Any, empty_database_url: str) -> None:
    def migrate(key: str) -> str:
        result = run(empty_database_url, "migrate", CELERIAC_BOOTSTRAP_API_KEY=key)
        assert result.exit_code == 0, result.output
        return str(result.stdout)

    def num_created() -> int:
        entries = json.loads(run(empty_database_url, "tenants", "audit", "--json").stdout)
        return sum(entry["action"] == "key.create" for entry in entries)

    key = "sk_bootstrap_" + "s" * 32
    assert "in place" in migrate(key)
    assert run(empty_database_url, "keys", "disable", "bootstrap").exit_code == 0
    assert "disabled" in migrate(key)
    assert num_created() == 1
    assert "in place" in migrate("sk_bootstrap_" + "t" * 32), "another secret is a new key"
    assert num_created() == 2


def test_a_bootstrap_key_of_the_wrong_form_is_explained_and_not_repeated(run: Any, empty_database_url: str) -> None:
    result = run(empty_database_url, "migrate", CELERIAC_BOOTSTRAP_API_KEY="hunter2")
    assert result.exit_code == 1
    assert "sk_<letters and digits>_<secret>" in result.output
    assert "hunter2" not in result.output


def test_a_key_works_until_it_is_disabled(run: Any, database_url: str, database: Engine) -> None:
    key = run(database_url, "keys", "create", "--tenant", "research", "--name", "notebook").output.strip()
    with session_factory(database)() as session:
        assert tenants.resolve_key(session, key) is not None
    listed = run(database_url, "keys", "list", "--tenant", "research").output
    key_id = key.split("_")[1]
    assert key_id in listed
    assert "notebook" in listed
    assert key not in listed
    assert run(database_url, "keys", "disable", key_id).exit_code == 0
    with session_factory(database)() as session:
        assert tenants.resolve_key(session, key) is None


def test_an_unknown_tenant_is_named_with_the_remedy(run: Any, database_url: str) -> None:
    result = run(database_url, "keys", "list", "--tenant", "nobody")
    assert result.exit_code == 1
    assert "celeriac tenants create nobody" in result.output


def test_a_database_that_is_not_there_is_explained(run: Any) -> None:
    result = run("postgresql://127.0.0.1:9/celeriac", "migrate")
    assert result.exit_code == 1
    assert "the database does not answer" in result.output
    assert "CELERIAC_DATABASE_URL" in result.output


def test_a_key_may_have_less_leave_than_its_tenant(run: Any, database_url: str) -> None:
    made = json.loads(run(database_url, "keys", "create", "--max-priority", "2", "--json").stdout)
    assert made["max_priority"] == 2
    changed = json.loads(run(database_url, "keys", "limit", made["id"], "--max-priority", "0", "--json").stdout)
    assert (changed["max_priority"], changed["limits"]) == (0, made["limits"])
    assert run(database_url, "keys", "limit", made["id"], "--max-priority", "11").exit_code == 2
