"""Fixtures for all tests: a real PostgreSQL and a real Redis, a database as good as new, rows in any state.

Each xdist worker has its own servers, so concurrent tests share nothing.
"""

import gc
import os
import secrets
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import certifi
import hypothesis
import psycopg
import pytest
import redis
import redis.utils
from sqlalchemy import Engine, update
from sqlalchemy.orm import Session, sessionmaker
from ulid import ULID

from domain.jobs import JobStatus
from domain.requests import GenerationRequest, JobRequest
from local.engine_environments import environment_folder, is_installed, recipes
from local.servers import OWNER, EmbeddedPostgres, EmbeddedRedis
from settings import Settings
from storage import database as storage_database
from storage.job_statements import COUNTED_AHEAD
from storage.tables import DEFAULT_TENANT_ID, Job, JobPayload, Tenant, TenantLoad
from tests.databases import Databases, as_role
from tests.thorough import IS_THOROUGH

MakeTenant = Callable[..., Tenant]
MakeJob = Callable[..., Job]

# How long an example takes to make and to run depends on the machine, and is not a failure. The examples are the same
# in every run, so that a change fails by what it changed; `make thorough` tries others each time.
hypothesis.settings.register_profile(
    "no clock",
    deadline=None,
    derandomize=not IS_THOROUGH,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("no clock")

# A shell that runs the tests in the background has them ignore Ctrl-C, and so would all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Exempt all that is imported by now from garbage collection, which would pause all threads to walk it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _one_authority(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Trust only one authority. Each HTTP client would spend 50 ms reading all of them; no test needs any."""
    certificates = tmp_path_factory.mktemp("authorities") / "one.pem"
    first, end, _ = Path(certifi.where()).read_text().partition("-----END CERTIFICATE-----\n")
    certificates.write_text(first + end)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_FILE", str(certificates))
        yield


@pytest.fixture(scope="session", autouse=True)
def _own_data_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Whoever pulled models into this checkout, or runs `celeriac up` in it, has the same tests as everybody else.
    The tests that are about an engine which is installed there find it by the variables that name environments."""
    installed = Settings().data_dir.absolute()
    with pytest.MonkeyPatch.context() as patch:
        for backend in recipes():
            if f"{backend.upper()}_ENVIRONMENT" not in os.environ and is_installed(backend, installed):
                patch.setenv(f"{backend.upper()}_ENVIRONMENT", str(environment_folder(installed, backend)))
        patch.setenv("CELERIAC_DATA_DIR", str(tmp_path_factory.mktemp("data")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _one_look_at_redis_version() -> Iterator[None]:
    """Look up the client's version once, not once per connection, which takes milliseconds each time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(redis.utils, "get_lib_version", cache(redis.utils.get_lib_version))
        yield


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def server_folder() -> Iterator[Path]:
    """Not pytest's own temporary folder, which the system user that PostgreSQL runs as under root cannot enter."""
    folder = Path(tempfile.mkdtemp(prefix="celeriac-test-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres_server(server_folder: Path) -> Iterator[EmbeddedPostgres]:
    settings = {"fsync": "off", "full_page_writes": "off"}  # a test's database need not survive a power cut
    settings["autovacuum_naptime"] = "1d"  # so that nothing changes between two tests; to be off would be a trouble
    with EmbeddedPostgres(server_folder / "postgres", settings=settings) as server:
        yield server


@pytest.fixture(scope="session")
def redis_server(server_folder: Path) -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis(server_folder / "redis") as server:
        yield server


@pytest.fixture(scope="session")
def postgres_administrator(postgres_server: EmbeddedPostgres) -> Iterator[psycopg.Connection[Any]]:
    """A connection that creates and drops databases."""
    with psycopg.connect(postgres_server.url_of("postgres"), autocommit=True) as connection:
        yield connection


@pytest.fixture(scope="session")
def databases(
    postgres_server: EmbeddedPostgres, postgres_administrator: psycopg.Connection[Any]
) -> Iterator[Databases]:
    databases = Databases(postgres_server.url_of, postgres_administrator)
    yield databases
    databases.close()


@pytest.fixture
def empty_database_url(
    postgres_server: EmbeddedPostgres, postgres_administrator: psycopg.Connection[Any]
) -> Iterator[str]:
    """The URL of a database with nothing in it."""
    name = f"test_{secrets.token_hex(6)}"
    postgres_administrator.execute(f"CREATE DATABASE {name} OWNER {OWNER}")
    yield as_role(OWNER, postgres_server.url_of(name))
    postgres_administrator.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def database_url(databases: Databases) -> Iterator[str]:
    """The URL of a migrated database of this test's own, in which nothing has happened."""
    database = databases.take()
    yield database.url
    databases.give_back(database)


@pytest.fixture
def database(database_url: str) -> Iterator[Engine]:
    """SQLAlchemy's engine for this test's database. In this project, `engine` means what runs a model."""
    database = storage_database.open_database(database_url, pool_size=8, max_overflow=32)
    yield database
    database.dispose()


@pytest.fixture
def session_factory(database: Engine) -> sessionmaker[Session]:
    return storage_database.session_factory(database)


@pytest.fixture
def session(session_factory: sessionmaker[Session]) -> Iterator[Session]:
    with session_factory() as session:
        yield session


@pytest.fixture
def redis_url(redis_server: EmbeddedRedis) -> str:
    """The URL of an empty Redis, even if the previous test killed the server."""
    redis_server.start()
    with redis.Redis.from_url(redis_server.url) as client:
        client.flushall()
    return redis_server.url


@pytest.fixture
def make_tenant(session_factory: sessionmaker[Session]) -> MakeTenant:
    """Commit a tenant with its load row: make_tenant(weight=2.0, max_queued=10)."""

    def make(**columns: Any) -> Tenant:
        tenant = Tenant(**{"id": uuid4(), "name": f"tenant-{secrets.token_hex(4)}", **columns})
        with session_factory.begin() as session:
            session.add(tenant)
            session.flush()
            session.add(TenantLoad(tenant_id=tenant.id))
        return tenant

    return make


@pytest.fixture
def make_job(session_factory: sessionmaker[Session]) -> MakeJob:
    """Commit a job in any status, with its payload, and count it in its tenant's load:
    make_job(status=JobStatus.IN_PROGRESS, attempt=2). Columns that the status demands are filled in."""

    def make(
        status: JobStatus = JobStatus.QUEUED,
        *,
        request: JobRequest | None = None,
        prompt_token_ids: list[int] | None = None,
        input_lengths: list[int] | None = None,
        **columns: Any,
    ) -> Job:
        job = Job(**(_job_defaults(status, columns.get("tenant_id", DEFAULT_TENANT_ID)) | columns))
        request = request or GenerationRequest(model=job.model, prompt="Once upon a time")
        with session_factory.begin() as session:
            session.add(job)
            session.flush()
            payload = JobPayload(job_id=job.id, request=request, prompt_token_ids=prompt_token_ids or [1, 2, 3])
            payload.input_lengths = input_lengths
            session.add(payload)
            session.execute(_counted(job))
            session.refresh(job)
        return job

    return make


def _job_defaults(status: JobStatus, tenant_id: UUID) -> dict[str, Any]:
    now = datetime.now(UTC)
    defaults: dict[str, Any] = {
        "id": UUID(bytes=ULID().bytes),
        "tenant_id": tenant_id,
        "model": "test-model",
        "model_revision": "main",
        "request_hash": b"hash",
        "status": status,
        "max_failures": 3,
        "num_prompt_tokens": 3,
        "max_tokens": 16,
        "seed": 7,
        "cost": 19,
        "job_metadata": {},
        "result_ttl_seconds": 86_400,
    }
    if status is not JobStatus.QUEUED:
        defaults |= {"attempt": 1, "started_at": now}
    if status is JobStatus.IN_PROGRESS:
        defaults |= {"lease_owner": uuid4(), "lease_expires_at": now + timedelta(seconds=15)}
    if status.is_terminal:
        defaults |= {"finished_at": now, "prune_at": now + timedelta(days=1)}
    return defaults


def _counted(job: Job) -> Any:
    is_queued, is_running = int(job.status is JobStatus.QUEUED), int(job.status is JobStatus.IN_PROGRESS)
    num_unused = job.cost - job.num_prompt_tokens - (job.num_committed_tokens or 0)
    num_sequences = max(1, (job.cost - job.num_prompt_tokens) // max(1, job.max_tokens))
    num_excess = max(0, num_unused - COUNTED_AHEAD * num_sequences)
    return (
        update(TenantLoad)
        .where(TenantLoad.tenant_id == job.tenant_id)
        .values(
            num_queued=TenantLoad.num_queued + is_queued,
            num_running=TenantLoad.num_running + is_running,
            num_queued_tokens=TenantLoad.num_queued_tokens + is_queued * job.cost,
            num_unused_tokens=TenantLoad.num_unused_tokens + is_running * num_unused,
            num_excess_tokens=TenantLoad.num_excess_tokens + is_running * num_excess,
        )
    )
