"""PostgreSQL's machine is lost, and its standby takes over: what was accepted is there, and all goes on."""

import contextlib
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID, uuid4

import httpx
import psutil
import psycopg
import pytest

from domain.catalog import Catalog
from domain.jobs import JobStatus, parse_id
from gpu_worker.threads import RunnerEventKind
from local.lifetime import ending_with_us
from local.servers import OWNER, EmbeddedPostgres, postgres_programs
from storage import database as storage_database
from tests.integration.api_harness import ApiServer
from tests.integration.runner_harness import MODEL, Rig
from tests.waiting import wait_until

pytestmark = pytest.mark.slow

SETTINGS = {"fsync": "off", "wal_receiver_status_interval": "1s"}


@pytest.fixture
def primary(server_folder: Path) -> Iterator[EmbeddedPostgres]:
    with EmbeddedPostgres(server_folder / "primary", settings=SETTINGS) as server:
        storage_database.migrate(server.url)
        yield server


@pytest.fixture
def standby(primary: EmbeddedPostgres, server_folder: Path) -> Iterator[EmbeddedPostgres]:
    """Follows the primary, which waits for it at every commit."""
    server = EmbeddedPostgres(server_folder / "standby", settings=SETTINGS)
    _copy(primary, server)
    with server:
        _execute(primary, "ALTER SYSTEM SET synchronous_standby_names = '*'")
        _execute(primary, "SELECT pg_reload_conf()")
        wait_until(
            lambda: _execute(primary, "SELECT sync_state FROM pg_stat_replication") == "sync", "the standby follows"
        )
        yield server


@pytest.fixture
def database_url(primary: EmbeddedPostgres, standby: EmbeddedPostgres) -> str:
    """Of both: whoever connects finds the one that takes writes."""
    hosts = "&".join(f"host={server.url.partition('host=')[2]}" for server in (primary, standby))
    return f"postgresql://{OWNER}@/{primary.database}?{hosts}&target_session_attrs=read-write"


def test_no_job_is_lost_with_the_machine_of_the_primary(
    rig: Rig, primary: EmbeddedPostgres, standby: EmbeddedPostgres
) -> None:
    worker = rig.start()
    with ApiServer(rig.settings, Catalog.load(rig.settings.models_file)) as api, Submitter(api.url) as submitter:
        wait_until(lambda: len(submitter.accepted) >= 10, "jobs are accepted")
        job_ids = rig.add_jobs(6, max_tokens=2400, priority=10)  # before those of the submitter
        worker.offer(job_ids)
        rig.wait_for_tokens(job_ids)
        assert not any(worker.ends(job_id) for job_id in job_ids), "they are running when it goes"
        _kill(primary)
        _execute(standby, "SELECT pg_promote()")
        num_accepted = len(submitter.accepted)
        wait_until(lambda: len(submitter.accepted) >= num_accepted + 10, "jobs are accepted again")
    worker.wait_for(RunnerEventKind.ENDED, job_ids)
    for job_id in job_ids:
        rig.assert_intact(job_id)
        assert rig.job(job_id).attempt == 1
    accepted = submitter.accepted
    assert len(set(accepted)) == len(accepted)
    wait_until(lambda: all(rig.job(id_).status is JobStatus.COMPLETED for id_ in accepted), "what was accepted has run")


class Submitter:
    """A client that sends one job after another, each until it is accepted."""

    def __init__(self, url: str) -> None:
        self.accepted: list[UUID] = []
        self._url = url
        self._is_stopping = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Submitter":
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._is_stopping.set()
        self._thread.join()

    def _run(self) -> None:
        body = {"model": MODEL, "prompt": "x", "params": {"max_tokens": 5}}
        key = str(uuid4())
        with httpx.Client(base_url=self._url, timeout=30) as http:
            while not self._is_stopping.wait(0.01):
                response = http.post("/v1/jobs", json=body, headers={"Idempotency-Key": key})
                assert response.status_code in (200, 202, 503), response.text
                if response.status_code != 503:
                    self.accepted.append(parse_id(response.json()["id"]))
                    key = str(uuid4())


def _copy(primary: EmbeddedPostgres, standby: EmbeddedPostgres) -> None:
    """Make the standby's data folder, with how it follows the primary in it."""
    data = standby.folder / "data"
    data.mkdir(mode=0o700, parents=True)
    if primary.user:
        shutil.chown(data, primary.user)
    program = str(postgres_programs() / "pg_basebackup")
    host = primary.url.partition("host=")[2]
    arguments = ["-h", host, "-U", "postgres", "-D", str(data), "-R", "-c", "fast"]
    subprocess.run(ending_with_us([program, *arguments], user=primary.user), check=True, cwd="/")
    (data / ".s.PGSQL.5432.lock").unlink()  # of the primary's socket, which lies among its data


def _kill(server: EmbeddedPostgres) -> None:
    """At once and whole, as a machine goes."""
    postmaster = psutil.Process(server.pid)
    for process in [postmaster, *postmaster.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _execute(server: EmbeddedPostgres, statement: str) -> object:
    """The first value it gives, if any."""
    with psycopg.connect(server.url_of(server.database), autocommit=True) as connection:
        row = connection.execute(statement).fetchone() if "SELECT" in statement else connection.execute(statement)
    return row[0] if isinstance(row, tuple) else None
