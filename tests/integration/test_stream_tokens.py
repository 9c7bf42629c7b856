"""Tokens with which a page reads the stream of one job, and nothing else, as long as their key is valid."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from sqlalchemy.orm import Session, sessionmaker

from domain.stream_tokens import StreamToken
from settings import Settings
from storage import tenants
from storage.tables import Tenant
from tests.integration.api_harness import ApiServer, HandWorker, all_events, numbered, open_events, post_job
from tests.waiting import wait_until


@pytest.fixture
def api_settings(database_url: str, redis_url: str) -> Settings:
    return Settings(
        database_url=database_url, redis_url=redis_url, auth="api_key", cors_origins="https://app.example.com"
    )


@pytest.fixture
def key(session_factory: sessionmaker[Session], make_tenant: Callable[..., Tenant]) -> str:
    tenant = make_tenant()
    with session_factory.begin() as session:
        return tenants.create_key(session, tenant.id)


@pytest.fixture
def owner(api: ApiServer, key: str) -> Iterator[httpx.Client]:
    """Has the key. `http` is the page, which has none."""
    with api.client(key) as client:
        yield client


def token_of(client: httpx.Client, job_id: str, **body: Any) -> dict[str, Any]:
    response = client.post(f"/v1/jobs/{job_id}/stream_token", json=body)
    assert response.status_code == 200, response.text
    assert response.headers["cache-control"] == "no-store"
    return dict(response.json())


def revoke(session_factory: sessionmaker[Session], key: str) -> None:
    with session_factory.begin() as session:
        row = tenants.resolve_key(session, key)
        assert row is not None
        assert tenants.revoke_key(session, row.id, row.tenant_id)


def test_a_page_reads_and_resumes_a_stream_without_any_header(
    owner: httpx.Client, http: httpx.Client, hand_worker: HandWorker
) -> None:
    job_id = post_job(owner)["id"]
    token = token_of(owner, job_id)
    assert token["url"] == f"/v1/jobs/{job_id}/events?token={token['token']}"
    job = hand_worker.claim(job_id)
    hand_worker.say(job, "a", "b")
    page = {"origin": "https://app.example.com"}
    with http.stream("GET", token["url"], headers=page) as response:
        assert response.headers["access-control-allow-origin"] == "https://app.example.com"
        assert response.headers["content-type"].startswith("text/event-stream")
    hand_worker.say(job, "c", first=3)
    hand_worker.finish(job, "a", "b", "c")
    whole = numbered(all_events(owner, job_id))
    given = {"params": {"token": token["token"]}}
    assert numbered(all_events(http, job_id, **given)) == whole
    assert numbered(all_events(http, job_id, headers={"last-event-id": "2"}, **given)) == whole[2:]
    assert http.get(token["url"], headers={"last-event-id": "4"}).status_code == 204
    assert http.head(token["url"]).status_code == 200


def test_a_token_opens_no_other_route_and_no_other_job(
    owner: httpx.Client,
    http: httpx.Client,
    api: ApiServer,
    make_tenant: Callable[..., Tenant],
    session_factory: sessionmaker[Session],
    hand_worker: HandWorker,
) -> None:
    mine, other = post_job(owner)["id"], post_job(owner)["id"]
    token: str = token_of(owner, mine)["token"]
    stranger = make_tenant()
    with session_factory.begin() as session:
        other_key = tenants.create_key(session, stranger.id)
    with api.client(other_key) as theirs:
        foreign = post_job(theirs)["id"]
        assert theirs.post(f"/v1/jobs/{mine}/stream_token").status_code == 404
    refused = [http.get(f"/v1/jobs/{id_}/events?token={token}") for id_ in (other, foreign, "job_" + "0" * 26, "x")]
    refused += [
        http.request(method, f"/v1/jobs{path}", params={"token": token})
        for method, path in [
            ("GET", ""),
            ("POST", ""),
            ("GET", f"/{mine}"),
            ("GET", f"/{mine}/output"),
            ("POST", f"/{mine}/cancel"),
            ("DELETE", f"/{mine}"),
            ("POST", f"/{mine}/stream_token"),
        ]
    ]
    refused += [
        http.get(f"/v1/jobs/{mine}/events", headers=headers)
        for headers in ({"authorization": f"Bearer {token}"}, {"x-api-key": token}, {"cookie": f"token={token}"})
    ]
    key_id, _, rest = token.removeprefix("st.").partition(".")
    forged = [
        token[:-1],
        token[:-2] + ("AA" if token[-2:] != "AA" else "BB"),
        "",
        "st",
        f"st.{'y' if key_id[0] == 'x' else 'x'}{key_id[1:]}.{rest}",
        "\0",
    ]
    forged += [f"st.none.{rest}", token.replace(mine, other), token.upper()]
    refused += [http.get(f"/v1/jobs/{mine}/events", params={"token": text}) for text in forged]
    refused.append(http.get(f"/v1/jobs/{other}/events", params={"token": forged[-2]}))
    assert [response.status_code for response in refused] == [401] * len(refused)
    assert not [response for response in refused if token in response.text]
    assert http.get(f"/v1/jobs/{mine}/events?token={token}&token={token}").status_code == 400


@pytest.mark.parametrize("end", ["revoked", "expired"])
def test_what_a_token_has_open_ends_with_it(
    end: str,
    owner: httpx.Client,
    http: httpx.Client,
    key: str,
    session_factory: sessionmaker[Session],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("api.authentication.RECHECK_SECONDS", 0.05)
    job_id = post_job(owner)["id"]
    url = token_of(owner, job_id)["url"]
    with http.stream("GET", url) as response:
        assert response.status_code == 200
        if end == "revoked":
            revoke(session_factory, key)
        else:
            monkeypatch.setattr(StreamToken, "is_expired", True)
        assert "job.completed" not in response.read().decode()  # returns once the server has ended the stream
    assert http.get(url).status_code == 401
    assert http.get(url, headers={"last-event-id": "0"}).status_code == 401


def test_any_process_takes_it_and_none_writes_it_down(
    owner: httpx.Client, http: httpx.Client, api_settings: Settings, key: str, caplog: pytest.LogCaptureFixture
) -> None:
    job_id = post_job(owner)["id"]
    with caplog.at_level(logging.DEBUG):
        token = token_of(owner, job_id)
        with ApiServer(api_settings) as restarted, restarted.client() as page:
            with open_events(page, job_id, params={"token": token["token"]}) as events:
                assert next(events).name == "job.queued"
            assert page.get(token["url"] + "&from=nowhere").status_code == 400
            assert token["token"] not in page.get(token["url"] + "&nothing=1").text
            wait_until(lambda: restarted.services.slots.num_taken == 0)
    seen = "\n".join(record.getMessage() + str(record.__dict__) for record in caplog.records if record.name != "httpx")
    assert token["token"] not in seen


@pytest.mark.parametrize("seconds", [0, -1, 86_401, 1.5, "60", True, None])
def test_a_token_has_a_bounded_life(owner: httpx.Client, seconds: object) -> None:
    job_id = post_job(owner)["id"]
    response = owner.post(f"/v1/jobs/{job_id}/stream_token", json={"expires_in_seconds": seconds})
    assert response.status_code == (200 if seconds is None else 400)
    assert seconds is None or response.json()["error"]["param"] == "expires_in_seconds"


def test_without_keys_a_page_is_written_the_same_way(
    database_url: str, redis_url: str, hand_worker: HandWorker
) -> None:
    with ApiServer(Settings(database_url=database_url, redis_url=redis_url)) as server, server.client() as http:
        job_id, other = post_job(http)["id"], post_job(http)["id"]
        token = token_of(http, job_id)["token"]
        hand_worker.run(job_id, "hello")
        assert all_events(http, job_id, params={"token": token})[-1].name == "job.completed"
        assert http.get(f"/v1/jobs/{other}/events", params={"token": token}).status_code == 401
        assert http.post("/v1/jobs/job_" + "0" * 26 + "/stream_token").status_code == 404
