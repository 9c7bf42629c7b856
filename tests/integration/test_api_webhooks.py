"""Webhook routes, with the OpenAI SDK unmodified where it has them."""

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from sqlalchemy.orm import Session, sessionmaker

from domain.webhooks import EVENT_TYPES
from settings import Settings
from storage import tenants
from tests.conftest import MakeTenant
from tests.integration.api_harness import ApiServer, HandWorker, body, post_job
from tests.waiting import wait_until
from tests.webhook_receiver import Receiver, receiving, sending

SDK_TYPES: Any = ["response.completed", "batch.failed"]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


@pytest.fixture
def api_settings(database_url: str, redis_url: str) -> Settings:
    return Settings(database_url=database_url, redis_url=redis_url, webhook_private_targets=True)


@pytest.fixture
def sdk(api: ApiServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{api.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_the_sdk_manages_endpoints(sdk: openai.OpenAI, receiver: Receiver) -> None:
    made = sdk.webhooks.create(name="mine", url=receiver.url(), event_types=SDK_TYPES)
    assert made.signing_secret.startswith("whsec_")
    assert made.signing_secret_hint == f"whsec_...{made.signing_secret[-4:]}"
    found = sdk.webhooks.retrieve(made.id)
    assert (found.name, found.url, found.event_types) == ("mine", receiver.url(), SDK_TYPES)
    assert not hasattr(found, "signing_secret")
    changed = sdk.webhooks.update(made.id, name="yours", event_types=["batch.completed"])
    assert (changed.name, changed.url, changed.event_types) == ("yours", receiver.url(), ["batch.completed"])
    others = [sdk.webhooks.create(name=str(n), url=receiver.url(), event_types=SDK_TYPES).id for n in range(3)]
    listed = [endpoint.id for endpoint in sdk.webhooks.list(limit=2)]  # over its pages
    assert listed == [*reversed(others), made.id]
    deleted = sdk.webhooks.delete(made.id)
    assert (deleted.id, deleted.deleted, deleted.object) == (made.id, True, "webhook_endpoint.deleted")
    with pytest.raises(openai.NotFoundError):
        sdk.webhooks.retrieve(made.id)
    assert sdk.webhooks.event_types.list().data == list(EVENT_TYPES)


def test_the_sdk_rotates_and_tests(sdk: openai.OpenAI, receiver: Receiver) -> None:
    made = sdk.webhooks.create(name="mine", url=receiver.url(), event_types=SDK_TYPES)
    rotated = sdk.webhooks.rotate_secret(made.id, keep_old_secret_active_for_24_hours=True)
    again = sdk.webhooks.rotate_secret(made.id)
    assert len({made.signing_secret, rotated.signing_secret, again.signing_secret}) == 3
    receiver.answer = lambda _: 418
    tested = sdk.webhooks.test(made.id, event_type="response.completed")
    assert (tested.status_code, tested.event_type, tested.success) == (418, "response.completed", True)
    [received] = receiver.received
    event = sdk.webhooks.unwrap(received.body, received.headers, secret=again.signing_secret)
    assert event.type == "response.completed"
    assert event.model_dump()["data"]["id"].startswith("resp_")


def test_a_test_without_an_answer_is_refused(sdk: openai.OpenAI) -> None:
    with receiving() as gone:
        made = sdk.webhooks.create(name="mine", url=gone.url(), event_types=SDK_TYPES)
    with pytest.raises(openai.BadRequestError, match="connection refused"):
        sdk.webhooks.test(made.id, event_type="batch.failed")


def test_a_job_tells_its_url_and_the_log_says_how(
    http: httpx.Client, hand_worker: HandWorker, receiver: Receiver, api_settings: Settings
) -> None:
    job = post_job(http, webhook=receiver.url(), webhook_events=["completed"])
    cancelled = post_job(http, webhook=receiver.url(), webhook_events=["completed"])
    http.post(f"/v1/jobs/{cancelled['id']}/cancel")
    hand_worker.run(job["id"], "a")
    with sending(api_settings):
        wait_until(lambda: http.get("/v1/webhook_deliveries?status=delivered").json()["data"])
        [listed] = http.get("/v1/webhook_deliveries").json()["data"]
        assert (listed["about"], listed["event_type"], listed["url"]) == (job["id"], "job.completed", receiver.url())
        path = f"/v1/webhook_deliveries/{listed['id']}"
        delivery = http.get(path).json()
        assert [(a["number"], a["status_code"]) for a in delivery["attempts"]] == [(1, 200)]
        assert http.post(f"{path}/redeliver").json()["status"] == "pending"
        wait_until(lambda: len(http.get(path).json()["attempts"]) == 2)
    first, second = receiver.received
    secret = http.get("/v1/webhook_secret").json()["signing_secret"]
    for received in (first, second):
        event = openai.OpenAI(api_key="none").webhooks.unwrap(received.body, received.headers, secret=secret)
        assert event.model_dump()["data"] == {"id": job["id"]}
    assert first.headers["webhook-id"] == second.headers["webhook-id"]
    rotated = http.post("/v1/webhook_secret/rotate_secret", json={"keep_old_secret_active_for_24_hours": True}).json()
    assert rotated["signing_secret"] != secret
    assert rotated["previous_secret_expires_at"]


def test_the_log_is_filtered_and_paged(http: httpx.Client, receiver: Receiver) -> None:
    endpoint = http.post(
        "/v1/webhook_endpoints", json={"name": "a", "url": receiver.url(), "event_types": ["job.cancelled"]}
    ).json()
    ids = [post_job(http, webhook=receiver.url())["id"] for _ in range(3)]
    for job_id in ids:
        http.post(f"/v1/jobs/{job_id}/cancel")
    of_job = http.get("/v1/webhook_deliveries", params={"job_id": ids[1]}).json()["data"]
    assert [(d["about"], d["webhook_endpoint_id"]) for d in of_job] in (
        [(ids[1], None), (ids[1], endpoint["id"])],
        [(ids[1], endpoint["id"]), (ids[1], None)],
    )
    seen, after = [], None
    while True:
        params = {"webhook_endpoint_id": endpoint["id"], "limit": 2} | ({"after": after} if after else {})
        page = http.get("/v1/webhook_deliveries", params=params).json()
        seen += [delivery["about"] for delivery in page["data"]]
        after = page["last_id"]
        if not page["has_more"]:
            break
    assert seen == ids[::-1]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"webhook": "https://user@example.com/"}, "webhook"),
        ({"webhook": "http://127.0.0.1/"}, "webhook"),
        ({"webhook": "https://example.com/" + "x" * 2048}, "webhook"),
        ({"webhook": 1}, "webhook"),
        ({"webhook": "http://localhost/", "webhook_events": []}, "webhook_events"),
        ({"webhook": "http://localhost/", "webhook_events": ["queued"]}, "webhook_events.0"),
        ({"webhook_events": ["failed"]}, None),
    ],
)
def test_a_bad_webhook_of_a_job_is_refused(http: httpx.Client, fields: dict[str, Any], param: str | None) -> None:
    response = http.post("/v1/jobs", json=body(**fields))
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert "user@" not in response.text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"url": "https://[::1]/"}, "url"),
        ({"event_types": []}, "event_types"),
        ({"event_types": ["job.queued"]}, "event_types.0"),
        ({"name": ""}, "name"),
        ({"secret": "whsec_mine"}, "secret"),
    ],
)
def test_a_bad_endpoint_is_refused(http: httpx.Client, fields: dict[str, Any], param: str) -> None:
    good = {"name": "a", "url": "http://localhost/", "event_types": ["job.failed"]}
    response = http.post("/v1/webhook_endpoints", json=good | fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_the_number_of_endpoints_is_bounded(http: httpx.Client) -> None:
    good = {"name": "a", "url": "http://localhost/", "event_types": ["job.failed"]}
    statuses = [http.post("/v1/webhook_endpoints", json=good).status_code for _ in range(51)]
    assert statuses == [200] * 50 + [400]


def test_private_targets_are_refused_unless_allowed(database_url: str, redis_url: str, receiver: Receiver) -> None:
    settings = Settings(database_url=database_url, redis_url=redis_url)
    with ApiServer(settings) as server, server.client() as client:
        for url in (receiver.url(), "https://localhost/", "https://10.0.0.1/", "https://x.internal/"):
            endpoint = {"name": "a", "url": url, "event_types": ["job.failed"]}
            assert client.post("/v1/webhook_endpoints", json=endpoint).status_code == 400
            assert client.post("/v1/jobs", json=body(webhook=url)).status_code == 400
    assert receiver.num_connections == 0


def test_a_tenant_sees_nothing_of_anothers_webhooks(
    database_url: str,
    redis_url: str,
    session_factory: sessionmaker[Session],
    make_tenant: MakeTenant,
    receiver: Receiver,
) -> None:
    with session_factory.begin() as session:
        mine, theirs = (tenants.create_key(session, make_tenant().id) for _ in range(2))
    settings = Settings(database_url=database_url, redis_url=redis_url, auth="api_key", webhook_private_targets=True)
    endpoint = {"name": "a", "url": receiver.url(), "event_types": ["job.cancelled"]}
    with ApiServer(settings) as server, server.client(mine) as me, server.client(theirs) as other:
        endpoint_id = me.post("/v1/webhook_endpoints", json=endpoint).json()["id"]
        for client in (me, other):
            http_id = post_job(client)["id"]
            client.post(f"/v1/jobs/{http_id}/cancel")
        [delivery] = me.get("/v1/webhook_deliveries").json()["data"]
        assert other.get("/v1/webhook_deliveries").json()["data"] == []
        assert other.get("/v1/webhook_endpoints").json()["data"] == []
        paths = [f"/v1/webhook_endpoints/{endpoint_id}", f"/v1/webhook_deliveries/{delivery['id']}"]
        assert [other.get(path).status_code for path in paths] == [404, 404]
        assert other.post(paths[0], json={"name": "b"}).status_code == 404
        assert other.delete(paths[0]).status_code == 404
        assert other.post(f"{paths[0]}/rotate_secret").status_code == 404
        assert other.post(f"{paths[0]}/test", json={"event_type": "job.failed"}).status_code == 404
        assert other.post(f"{paths[1]}/redeliver").status_code == 404
        assert me.get(paths[0]).json()["name"] == "a"
        secrets = {client.get("/v1/webhook_secret").json()["signing_secret"] for client in (me, other)}
        assert len(secrets) == 2
