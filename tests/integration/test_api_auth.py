"""Keys and tenants: nothing but health and the pages answers without a key, and nobody's job is anybody else's."""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta

import httpx
import pytest
from fastapi.routing import APIRoute
from sqlalchemy.orm import Session, sessionmaker
from starlette.routing import BaseRoute, Mount, WebSocketRoute

from api.app import create_app
from domain.catalog import Catalog
from settings import Settings
from storage import tenants
from storage.tables import Tenant
from tests.integration.api_harness import CATALOG, ApiServer, HandWorker, body, post_job
from tests.waiting import slowness

OPEN_PATHS = {"/health", "/health/live", "/health/ready", "/ping", "/version", "/", "/docs", "/openapi.json"}


@pytest.fixture
def api_settings(database_url: str, redis_url: str) -> Settings:
    return Settings(database_url=database_url, redis_url=redis_url, auth="api_key")


@pytest.fixture
def make_key(session_factory: sessionmaker[Session], make_tenant: Callable[..., Tenant]) -> Callable[..., str]:
    """The key of a tenant of its own: make_key(expires_at=...)."""

    def make(*, expires_at: datetime | None = None, max_queued: int | None = None) -> str:
        tenant = make_tenant(max_queued=max_queued)
        with session_factory.begin() as session:
            return tenants.create_key(session, tenant.id, expires_at=expires_at)

    return make


def routes_of(routes: Iterable[BaseRoute]) -> Iterator[tuple[str, str]]:
    """(method, path) of every route, those of included routers too."""
    for route in routes:
        if isinstance(route, APIRoute):
            yield from ((method, route.path) for method in sorted(route.methods or ()))
        elif isinstance(route, Mount):
            assert route.path == "/static", "files of the pages, which tell nothing"
        elif (included := getattr(route, "original_router", None)) is not None:
            yield from routes_of(included.routes)
        elif isinstance(route, WebSocketRoute):
            assert route.path == "/v1/responses", "tests/conformance/test_openai_socket.py asks it without a key"
        else:
            raise AssertionError(f"{route} is of a kind that this walk does not know")


def test_every_route_but_health_and_pages_asks_for_a_key(api: ApiServer, http: httpx.Client) -> None:
    routes = list(routes_of(api.app.routes))
    assert len(routes) >= 12
    for method, path in routes:
        response = http.request(method, path.replace("{job_id}", "job_" + "0" * 26))
        if path in OPEN_PATHS:
            assert response.status_code in (200, 503), path
        else:
            assert response.status_code == 401, (method, path)
            assert method == "HEAD" or "invalid_api_key" in json.dumps(response.json()["error"]), path
            assert response.headers["www-authenticate"] == "Bearer"


def test_a_key_comes_in_the_header_of_either_api(http: httpx.Client, make_key: Callable[..., str]) -> None:
    key = make_key()
    counted = {"model": "large", "messages": [{"role": "user", "content": "Hi"}]}
    for headers in ({"x-api-key": key}, {"authorization": f"Bearer {key}"}):
        answer = http.post("/v1/messages/count_tokens", json=counted, headers=headers)
        assert answer.json() == {"input_tokens": len("user: Hi\nassistant: ")}
        assert http.get("/v1/jobs", headers=headers).status_code == 200
    refused = http.post("/v1/messages/count_tokens", json=counted, headers={"x-api-key": "wrong"})
    assert (refused.status_code, refused.json()["error"]["type"]) == (401, "authentication_error")


@pytest.mark.parametrize(
    "authorization",
    ["", "Bearer", "Basic c2s=", "sk_x", "Bearer sk_unknown1_" + "x" * 43, "Bearer x", "Bearer \x80"],
)
def test_a_wrong_key_is_refused_and_not_repeated(http: httpx.Client, authorization: str) -> None:
    response = http.get("/v1/jobs", headers=[(b"authorization", authorization.encode("latin-1"))])
    assert response.status_code == 401
    assert "sk_" not in response.text


def test_a_key_opens_its_own_tenant_alone(
    api: ApiServer, make_key: Callable[..., str], hand_worker: HandWorker
) -> None:
    with api.client(make_key()) as mine, api.client(make_key()) as theirs:
        job_id = post_job(mine, idempotency_key="same")["id"]
        hand_worker.run(job_id, "mine")
        assert mine.get(f"/v1/jobs/{job_id}").json()["output"]["text"] == "mine"
        unknown = theirs.get("/v1/jobs/job_" + "0" * 26).json()["error"]
        for method, path in [("GET", ""), ("GET", "/events"), ("GET", "/output"), ("POST", "/cancel"), ("DELETE", "")]:
            response = theirs.request(method, f"/v1/jobs/{job_id}{path}")
            assert response.status_code == 404
            expected = unknown | {"message": unknown["message"].replace("job_" + "0" * 26, job_id)}
            assert response.json()["error"] == expected
        assert theirs.get("/v1/jobs").json()["data"] == []
        assert theirs.get("/v1/jobs", params={"after": job_id, "order": "asc"}).json()["data"] == []
        assert post_job(theirs, idempotency_key="same")["id"] != job_id
        assert mine.get(f"/v1/jobs/{job_id}").status_code == 200


def test_an_expired_key_is_refused(api: ApiServer, make_key: Callable[..., str]) -> None:
    with api.client(make_key(expires_at=datetime.now(UTC) - timedelta(seconds=1))) as client:
        assert client.get("/v1/jobs").status_code == 401


def test_a_revoked_key_is_refused_once_it_is_forgotten(
    api: ApiServer,
    make_key: Callable[..., str],
    session_factory: sessionmaker[Session],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("api.authentication.REMEMBER_SECONDS", 0.2)
    key = make_key()
    with api.client(key) as client:
        assert client.get("/v1/jobs").status_code == 200
        with session_factory.begin() as session:
            row = tenants.resolve_key(session, key)
            assert row is not None
            assert tenants.revoke_key(session, row.id, row.tenant_id)
        revoked_at = time.monotonic()
        while client.get("/v1/jobs").status_code == 200:
            assert time.monotonic() - revoked_at < 5 * slowness()


def test_a_full_queue_is_refused_until_there_is_room(
    api: ApiServer, make_key: Callable[..., str], hand_worker: HandWorker
) -> None:
    with api.client(make_key(max_queued=2)) as client:
        first = post_job(client)["id"]
        post_job(client)
        refused = client.post("/v1/jobs", json=body())
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_queued_jobs")
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        hand_worker.claim(first)
        post_job(client)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.com"])
def test_an_api_without_keys_serves_this_machine_only(host: str) -> None:
    with pytest.raises(ValueError, match="set CELERIAC_AUTH=api_key"):
        create_app(Settings(host=host), CATALOG)
    create_app(Settings(host=host, auth="api_key"), CATALOG)


def test_an_api_that_others_reach_sends_webhooks_to_no_private_targets() -> None:
    with pytest.raises(ValueError, match="name the networks of your receivers"):
        create_app(Settings(host="0.0.0.0", auth="api_key", webhook_private_targets=True), CATALOG)
    create_app(Settings(host="127.0.0.1", auth="api_key", webhook_private_targets=True), CATALOG)
    create_app(Settings(host="0.0.0.0", auth="api_key", webhook_private_networks="10.1.0.0/16"), CATALOG)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.8.8.8"])
def test_an_api_on_the_loopback_needs_no_keys(host: str) -> None:
    create_app(Settings(host=host), Catalog(list(CATALOG)))
