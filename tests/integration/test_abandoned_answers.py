"""Clients that leave before they have what they asked for, in great numbers."""

import asyncio
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, aclosing

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session, sessionmaker

from api.authentication import Authenticator
from api.events import JobEventStream, JobToStream, Start
from api.opening import open_services
from domain.shares import current_tenant
from settings import Settings
from storage import job_queries, tenants
from storage.database import async_session_factory, open_statement_database
from storage.log_reads import MAX_READS
from storage.tables import DEFAULT_TENANT_ID, Job, Tenant
from tests.integration.api_harness import CATALOG, MODEL, ApiServer, open_events, post_job
from tests.waiting import wait_until

pytestmark = pytest.mark.anyio


async def test_a_stream_whose_client_leaves_after_its_place_in_the_queue(
    api_settings: Settings, make_job: Callable[..., Job]
) -> None:
    """It is still reading the job's log then, which must end first."""
    job = make_job(model=MODEL)
    current_tenant.set(DEFAULT_TENANT_ID)
    async with open_services(api_settings, CATALOG) as services:
        record = await services.read(job_queries.get, job.id, DEFAULT_TENANT_ID)
        assert record is not None
        stream = JobEventStream(services, JobToStream.of(record.job), Start(0), with_token_ids=False)
        async with asyncio.timeout(60), aclosing(stream.frames()) as frames:
            async for frame in frames:
                if b"job.queued" in frame:
                    break
        assert services.streams.num_streams == 0


def test_many_requests_in_advance_whose_client_leaves(api: ApiServer, caplog: pytest.LogCaptureFixture) -> None:
    request = b"GET /v1/jobs HTTP/1.1\r\nhost: localhost\r\n\r\n"
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", api.port), timeout=30) as connection:
            connection.sendall(request * 200)
            connection.recv(1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # leaves with a reset
    with api.client() as client:
        assert client.get("/v1/jobs").status_code == 200
    assert "request failed" not in caplog.text


@pytest.fixture
def key(session_factory: sessionmaker[Session], make_tenant: Callable[..., Tenant]) -> str:
    with session_factory.begin() as session:
        return tenants.create_key(session, make_tenant().id)


@pytest.fixture
def api_with_keys(database_url: str, redis_url: str) -> Iterator[ApiServer]:
    with ApiServer(Settings(database_url=database_url, redis_url=redis_url, auth="api_key")) as api:
        yield api


def test_the_streams_of_one_tenant_leave_connections_to_others(
    api_with_keys: ApiServer, key: str, session: Session
) -> None:
    api = api_with_keys
    waiting = text("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%job_chunks%'")
    with api.client(key) as client, ExitStack() as stack:
        job_ids = [post_job(client)["id"] for _ in range(3 * MAX_READS)]
        session.execute(text("LOCK TABLE job_chunks IN ACCESS EXCLUSIVE MODE"))
        for job_id in job_ids:
            stack.enter_context(open_events(client, job_id))
        wait_until(lambda: api.services.streams.num_streams == 3 * MAX_READS)
        wait_until(lambda: session.execute(waiting).scalar_one() == MAX_READS // 2)
        session.rollback()


async def test_requests_with_the_same_key_share_its_look_up(
    database_url: str, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    look_up, looked_up = tenants.resolve_key, list[str]()

    def counted(session: Session, key: str) -> object:
        looked_up.append(key)
        return look_up(session, key)

    monkeypatch.setattr(tenants, "resolve_key", counted)
    database = open_statement_database(database_url)
    authenticator = Authenticator(async_session_factory(database), is_open=False)
    identities = await asyncio.gather(*(authenticator.identify(f"Bearer {key}") for _ in range(50)))
    assert len({identity.key_id for identity in identities}) == 1
    assert looked_up == [key]
    await authenticator.aclose()
    await database.dispose()
