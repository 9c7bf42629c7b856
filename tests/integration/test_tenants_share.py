"""One tenant takes all that it can of everything that requests share; another's request of each kind goes on."""

import asyncio
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from functools import partial
from uuid import UUID, uuid4

import httpx
import pytest
from sqlalchemy import event, text
from sqlalchemy.orm import Session, sessionmaker

from api.opening import open_services
from api.pools import MAX_WRITES
from api.services import Services
from domain.shares import current_tenant
from settings import Settings
from storage import tenants, webhook_deliveries
from storage.tables import Tenant
from tests.integration.api_harness import CATALOG, ApiServer, open_events, post_job
from tests.integration.test_api_slow_uploads import HEAD, PART, upload
from tests.waiting import wait_until

NUM_PLACES = 4


@pytest.fixture
def api_settings(database_url: str, redis_url: str) -> Settings:
    return Settings(
        database_url=database_url, redis_url=redis_url, auth="api_key", max_streams=NUM_PLACES, max_uploads=NUM_PLACES
    )


@pytest.fixture
def keys(session_factory: sessionmaker[Session], make_tenant: Callable[..., Tenant]) -> tuple[str, str]:
    """Of two tenants."""
    with session_factory.begin() as session:
        one, other = (tenants.create_key(session, make_tenant().id) for _ in range(2))
    return one, other


@pytest.fixture
def clients(api: ApiServer, keys: tuple[str, str]) -> Iterator[tuple[httpx.Client, httpx.Client]]:
    with api.client(keys[0]) as greedy, api.client(keys[1]) as other:
        yield greedy, other


def refusal_of(answer: httpx.Response) -> str:
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "server_is_overloaded")
    assert int(answer.headers["retry-after"]) >= 1
    return str(answer.json()["error"]["message"])


def test_streams_and_waits(api: ApiServer, clients: tuple[httpx.Client, httpx.Client]) -> None:
    greedy, other = clients
    job_id, its_job_id = post_job(greedy)["id"], post_job(other)["id"]
    with ExitStack() as stack:
        streams = [stack.enter_context(open_events(greedy, job_id)) for _ in range(NUM_PLACES // 2)]
        assert [next(events).name for events in streams] == ["job.queued"] * len(streams)
        said = refusal_of(greedy.get(f"/v1/jobs/{job_id}/events"))
        assert "2 of your streams are open" in said
        assert "poll the job instead" in said
        assert greedy.get(f"/v1/jobs/{job_id}", params={"wait": 60}).json()["status"] == "queued"  # at once
        with open_events(other, its_job_id) as events:
            next(events)
    wait_until(lambda: api.services.slots.num_taken == 0)


def num_taken(api: ApiServer) -> list[int]:
    return [api.services.uploads.num_taken, api.services.large_bodies.num_taken]


def test_uploads_and_large_bodies(
    api: ApiServer, clients: tuple[httpx.Client, httpx.Client], keys: tuple[str, str]
) -> None:
    greedy, other = clients
    api.services.large_bodies.num_places = NUM_PLACES
    key = f"authorization: Bearer {keys[0]}\r\n\r\n".encode()
    job = b"POST /v1/jobs HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 100000\r\n"
    with ExitStack() as stack:
        for head in [HEAD[:-2] + key + PART, job + key + b"{"] * (NUM_PLACES // 2):
            connection = stack.enter_context(closing(socket.create_connection(("127.0.0.1", api.port), timeout=30)))
            connection.sendall(head)
        wait_until(lambda: num_taken(api) == [NUM_PLACES // 2] * 2)
        assert "2 of your uploads are in progress" in refusal_of(upload(greedy))
        large = {"model": "large", "prompt": "x" * 70_000, "params": {"max_tokens": 1}}
        assert "2 of your requests with bodies" in refusal_of(greedy.post("/v1/jobs", json=large))
        assert upload(other).status_code == 200
        assert other.post("/v1/jobs", json=large).status_code == 202
        assert post_job(greedy)["status"] == "queued"  # a small body needs no place
    wait_until(lambda: num_taken(api) == [0, 0])


def test_downloads(api: ApiServer, clients: tuple[httpx.Client, httpx.Client]) -> None:
    greedy, _ = clients
    file_ids = [upload(client).json()["id"] for client in clients]
    api.services.downloads.num_places = 0
    assert "0 of your downloads" in refusal_of(greedy.get(f"/v1/files/{file_ids[0]}/content"))
    api.services.downloads.num_places = 1
    for client, file_id in zip(clients, file_ids, strict=True):
        assert client.get(f"/v1/files/{file_id}/content").content == b"{}\n"
        wait_until(lambda: api.services.downloads.num_taken == 0)


def test_downloads_that_begin_together_leave_room(
    api: ApiServer, clients: tuple[httpx.Client, httpx.Client], keys: tuple[str, str]
) -> None:
    """Each found places free when it came."""
    greedy, other = clients
    content = {"file": ("a", b"a" * 20_000_000)}
    large = greedy.post("/v1/files", files=content, data={"purpose": "batch"}).raise_for_status().json()["id"]
    file_id = upload(other).json()["id"]
    get = f"GET /v1/files/{large}/content HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {keys[0]}\r\n\r\n"
    api.services.downloads.num_places = NUM_PLACES
    with ExitStack() as stack:
        address = ("127.0.0.1", api.port)
        connections = [
            stack.enter_context(closing(socket.create_connection(address, timeout=30))) for _ in range(5 * NUM_PLACES)
        ]
        for connection in connections:
            connection.sendall(get.encode())
        answers = [connection.recv(12) for connection in connections]
        assert answers.count(b"HTTP/1.1 200") <= NUM_PLACES // 2
        assert other.get(f"/v1/files/{file_id}/content").content == b"{}\n"
    wait_until(lambda: api.services.downloads.num_taken == 0)


def test_a_download_that_nobody_reads_ends(
    api: ApiServer, clients: tuple[httpx.Client, httpx.Client], keys: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = {"file": ("a", b"a" * 20_000_000)}
    file_id = clients[0].post("/v1/files", files=content, data={"purpose": "batch"}).raise_for_status().json()["id"]
    monkeypatch.setattr("api.downloads.SEND_TIMEOUT_SECONDS", 0.3)
    get = f"GET /v1/files/{file_id}/content HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {keys[0]}\r\n\r\n"
    with closing(socket.create_connection(("127.0.0.1", api.port), timeout=30)) as connection:
        connection.sendall(get.encode())
        wait_until(lambda: api.services.downloads.num_taken == 1)
        wait_until(lambda: api.services.downloads.num_taken == 0)
        received = b"".join(iter(partial(connection.recv, 2**20), b""))  # what was on its way, and then the end
    assert len(received) < 20_000_000


def test_webhooks_of_a_tenant_leave_room_for_those_of_another(
    session_factory: sessionmaker[Session], make_tenant: Callable[..., Tenant]
) -> None:
    """Even if they are for the same host, older, and to more hosts than there is room for."""
    greedy, other = make_tenant().id, make_tenant().id
    insert = text(
        "INSERT INTO webhook_deliveries (tenant_id, event_id, type, url, next_attempt_at) SELECT :tenant,"
        " gen_random_uuid(), 'job.completed', 'https://host' || n % :num_hosts || '.test/',"
        " now() - :age * interval '1 s' FROM generate_series(0, :last) n"
    )
    with session_factory.begin() as session:
        session.execute(insert, {"tenant": greedy, "num_hosts": 50, "age": 60, "last": 499})
        session.execute(insert, {"tenant": other, "num_hosts": 1, "age": 1, "last": 2})
        claimed = webhook_deliveries.claim(
            session,
            room=64,
            room_per_tenant=32,
            room_by_tenant={greedy: 16},
            room_per_host=8,
            room_by_host={(greedy, "host0.test"): 0, (other, "host0.test"): 2},
            lease_seconds=30,
        )
    assert [delivery.tenant_id for delivery in claimed].count(other) == 2
    assert [delivery.tenant_id for delivery in claimed].count(greedy) == 16
    assert not [delivery for delivery in claimed if delivery.queue == (greedy, "host0.test")]


@pytest.mark.anyio
async def test_writes_of_two_tenants_open_no_connection_for_each(api_settings: Settings) -> None:
    opened: list[object] = []

    async def write_often(services: Services, tenant_id: UUID) -> None:
        current_tenant.set(tenant_id)
        for _ in range(20):
            await services.write(lambda session: session.execute(text("SELECT 1")).scalar_one())

    async with open_services(api_settings, CATALOG) as services:
        engine = services.sessions.kw["bind"].sync_engine
        event.listen(engine, "connect", lambda connection, record: opened.append(connection))
        greedy, other = uuid4(), uuid4()
        await asyncio.gather(*(write_often(services, tenant_id) for tenant_id in [greedy] * 16 + [other]))
    assert len(opened) <= MAX_WRITES
