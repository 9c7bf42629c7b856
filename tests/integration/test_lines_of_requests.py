"""In which line requests wait to begin, while that of requests without a key does not move."""

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from uuid import UUID, uuid4

import httpx
import pytest
from sqlalchemy.orm import Session, sessionmaker

from api.starts import Starts
from domain.jobs import external_id
from domain.shares import NO_TENANT
from domain.stream_tokens import StreamToken
from metrics import Process, registries
from settings import Settings
from storage import tenants
from storage.tables import Tenant
from tests.integration.api_harness import ApiServer
from tests.waiting import wait_until

KEYLESS = b"GET /v1/jobs HTTP/1.1\r\nhost: localhost\r\n\r\n"
ROOM = 2  # of those without a key, who have half of all places


class HeldStarts(Starts):
    is_held = True

    def _may_begin(self, tenant_id: UUID) -> bool:
        return not (self.is_held and tenant_id == NO_TENANT) and super()._may_begin(tenant_id)

    @property
    def num_keyless(self) -> int:
        return self._waiting.num_of(NO_TENANT)

    @property
    def num_gone(self) -> int:
        return sum(is_gone() for _, is_gone in list(self._waiting))


@pytest.fixture
def api_settings(database_url: str, redis_url: str) -> Settings:
    return Settings(database_url=database_url, redis_url=redis_url, auth="api_key")


@pytest.fixture
def key(session_factory: sessionmaker[Session], make_tenant: Callable[..., Tenant]) -> str:
    with session_factory.begin() as session:
        return tenants.create_key(session, make_tenant().id)


@pytest.fixture
def starts(api: ApiServer) -> HeldStarts:
    api.services.starts = HeldStarts(2 * ROOM)
    return api.services.starts


@pytest.fixture
def keyless(api: ApiServer, starts: HeldStarts) -> Iterator[list[socket.socket]]:
    """As many as have room."""
    with ExitStack() as stack:
        address = ("127.0.0.1", api.port)
        connections = [stack.enter_context(socket.create_connection(address)) for _ in range(ROOM)]
        for connection in connections:
            connection.sendall(KEYLESS)
        wait_until(lambda: starts.num_keyless == ROOM, "they wait")
        yield connections
        starts.is_held = False


@pytest.mark.usefixtures("keyless")
def test_one_request_too_many_without_a_key_is_refused(http: httpx.Client) -> None:
    refused = http.get("/v1/jobs")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "server_is_overloaded")
    assert f"{ROOM} of your requests are waiting to begin" in refused.json()["error"]["message"]
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.headers["x-request-id"]


@pytest.mark.usefixtures("keyless")
@pytest.mark.parametrize("path", ["/health", "/health/live", "/health/ready", "/ping"])
def test_health_waits_behind_nobody(http: httpx.Client, path: str) -> None:
    assert http.get(path).status_code == 200


@pytest.mark.usefixtures("keyless")
def test_keys_and_stream_tokens_that_are_new_do_not_wait_behind_those_without(api: ApiServer, key: str) -> None:
    token = StreamToken("none", uuid4(), int(time.time()) + 600).signed(uuid4())
    with api.client() as stranger:
        reading = stranger.get(f"/v1/jobs/{external_id(uuid4())}/events", params={"token": token})
        assert reading.json()["error"]["param"] == "token"  # as it is none of ours
    with api.client(key) as client:
        assert client.get("/v1/jobs").status_code == 200
    with api.client("wrong") as guesser:
        assert [guesser.get("/v1/jobs").status_code for _ in range(2)] == [401, 503]  # then it is known to be wrong


def test_what_a_client_asked_that_has_gone_is_not_done(
    api: ApiServer, starts: HeldStarts, keyless: list[socket.socket], key: str
) -> None:
    given_up = {"method": "GET", "route": "unmatched", "status": "499"}

    def num_given_up() -> float:
        return registries[Process.API].get_sample_value("celeriac_http_requests_total", given_up) or 0.0

    before = num_given_up()
    for connection in keyless:
        connection.close()
    wait_until(lambda: starts.num_gone == ROOM, "the server sees that they have gone")
    starts.is_held = False
    with api.client(key) as client:
        assert client.get("/v1/jobs").status_code == 200  # its turn is theirs, too
    wait_until(lambda: num_given_up() == before + ROOM, "they are given up")
    assert starts.num_keyless == 0
