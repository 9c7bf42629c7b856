"""The last release's code beside this one's, on every schema between the two: no job and no stream is lost."""

import itertools
import threading
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from storage.database import migrate
from tests.chaos.plant import Part
from tests.integration.upgrade_harness import (
    THIS_RELEASE,
    Installation,
    Release,
    Schema,
    unpack_last_release,
)
from tests.thorough import IS_THOROUGH
from tests.waiting import wait_until

pytestmark = pytest.mark.slow

SHORT, LONG = 5, 50  # tokens: the latter take a second
ROLES = ("api", "worker", "maintenance")
#: Which processes are of the last release. In the second of some, a new worker continues what an old one has begun; of
#: all, there is also one in which it is the other way round.
SOME_MIXTURES = [{"worker"}, {"api", "maintenance"}]
ALL_MIXTURES = [set(old) for number in range(4) for old in itertools.combinations(ROLES, number)]


@pytest.fixture(scope="module")
def last_release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    return unpack_last_release(tmp_path_factory.mktemp("release"))


@pytest.fixture
def installation(
    last_release: Release, tmp_path: Path, empty_database_url: str, redis_url: str
) -> Iterator[Installation]:
    with Installation(tmp_path, empty_database_url, redis_url) as installation:
        installation.run(last_release, "migrate")
        yield installation


@pytest.fixture
def schema(installation: Installation, empty_database_url: str) -> Iterator[Schema]:
    """As the last release made it."""
    schema = Schema(empty_database_url)
    yield schema
    schema.close()


def test_the_last_release_works_on_while_the_schema_is_upgraded_and_downgraded(
    last_release: Release, installation: Installation, schema: Schema
) -> None:
    first = schema.revision
    newer = schema.revisions_after(first)
    steps = [*((schema.upgrade, revision) for revision in newer)]
    steps += [(schema.downgrade, revision) for revision in [first, *newer[:-1]][::-1]]
    api = installation.start_api(last_release)
    installation.start_worker(last_release)
    installation.start(last_release, "maintenance")
    num_tokens_by_job_id: dict[str, int] = {}
    for change, revision in [*steps, (schema.upgrade, "head")]:
        with api.streaming(LONG) as job_id:
            change(revision)
            num_tokens_by_job_id |= {job_id: LONG, api.submit(SHORT): SHORT}
    with api.streaming(SHORT):
        for job_id, num_tokens in num_tokens_by_job_id.items():
            api.check(job_id, num_tokens)


def test_processes_of_both_releases_run_each_others_jobs(
    last_release: Release, installation: Installation, schema: Schema
) -> None:
    schema.upgrade("head")
    release_of = {True: last_release, False: THIS_RELEASE}
    apis = {is_old: installation.start_api(release_of[is_old]) for is_old in (True, False)}

    def start(old: set[str]) -> list[Part]:
        return [
            installation.start_worker(release_of["worker" in old]),
            installation.start(release_of["maintenance" in old], "maintenance"),
        ]

    first, *others = ALL_MIXTURES if IS_THOROUGH else SOME_MIXTURES
    parts = start(first)
    with apis["api" in first].streaming(SHORT):
        pass
    for old in others:
        api = apis["api" in old]
        with api.streaming(LONG):
            for part in parts:
                installation.stop(part)
            parts = start(old)
        with api.streaming(SHORT):
            pass


def test_nobody_waits_behind_a_migration_that_waits_for_a_dump(empty_database_url: str) -> None:
    migrate(empty_database_url)
    schema = Schema(empty_database_url)
    schema.downgrade("0047")
    waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'tenants'::regclass"
    upgrade = threading.Thread(target=schema.upgrade, args=("0048",))
    with psycopg.connect(empty_database_url) as dump, psycopg.connect(empty_database_url, autocommit=True) as other:
        dump.execute("LOCK TABLE tenants, jobs IN ACCESS SHARE MODE")
        upgrade.start()
        wait_until(lambda: other.execute(waiting).fetchone() == (1,), "the migration waits")
        other.execute("SET statement_timeout = '30s'")
        other.execute("SELECT id FROM tenants")
        dump.rollback()
        upgrade.join(300)
    assert schema.revision == "0048"
    schema.close()
