"""Who is let in from a browser: no foreign host or page without keys, CORS for the pages that the settings name."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from sqlalchemy.orm import Session, sessionmaker

from api.app import create_app
from domain.access import Scope
from settings import Settings
from storage import tenants
from storage.tables import DEFAULT_TENANT_ID
from tests.integration.api_harness import CATALOG, ApiServer, HandWorker, open_events, post_job, raw_request
from tests.waiting import slowness, wait_until

PAGE = "https://app.example.com"
EVIL = "https://evil.example"


def refused(answer: httpx.Response) -> bool:
    return answer.status_code == 403 and answer.json()["error"]["code"] == "permission_denied"


@pytest.mark.parametrize(
    "headers",
    [{"host": "evil.example:8000"}, {"origin": EVIL}, {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}],
    ids=["rebound name", "origin", "fetch metadata"],
)
def test_a_foreign_page_neither_reads_nor_changes_anything(
    http: httpx.Client, hand_worker: HandWorker, headers: dict[str, str]
) -> None:
    job_id = post_job(http)["id"]
    secret = http.get("/v1/webhook_secret").json()
    form = {"file": ("a.jsonl", b"{}")}
    tried = [
        http.get("/v1/jobs", headers=headers),
        http.get(f"/v1/jobs/{job_id}/events", headers=headers),
        http.get("/v1/webhook_secret", headers=headers),
        http.get("/health", headers=headers),
        http.get("/", headers=headers),
        http.post(f"/v1/jobs/{job_id}/cancel", headers=headers),
        http.post("/v1/admin/models/fake/unload", headers=headers),
        http.post("/v1/webhook_secret/rotate_secret", headers={"content-type": "text/plain", **headers}),
        http.post("/v1/files", files=form, data={"purpose": "batch"}, headers=headers),
        http.delete(f"/v1/jobs/{job_id}", headers=headers),
        http.options("/v1/jobs", headers={"access-control-request-method": "POST", **headers}),
    ]
    assert all(refused(answer) for answer in tried), [(one.request.url, one.status_code) for one in tried]
    assert all(answer.headers["x-request-id"] for answer in tried)
    assert http.get(f"/v1/jobs/{job_id}").json()["status"] == "queued"
    assert http.get("/v1/webhook_secret").json() == secret


def test_programs_own_pages_and_links_are_let_in(api: ApiServer, http: httpx.Client) -> None:
    own = {"origin": api.url, "sec-fetch-site": "same-origin"}
    link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
    for headers in ({}, own, link, {"host": "localhost:8000"}, {"host": "[::1]"}):
        assert http.get("/v1/models", headers=headers).status_code == 200, headers
    assert b" 200 " in raw_request(api.port, b"GET /v1/models HTTP/1.0\r\n\r\n").split(b"\r\n")[0]


@pytest.mark.parametrize(
    "heads",
    [
        b"",
        b"Host: localhost\r\nHost: evil.example\r\n",
        b"Host: localhost\r\nOrigin: null\r\nOrigin: http://localhost\r\n",
    ],
)
def test_a_head_that_says_two_things_or_nothing_is_malformed(api: ApiServer, heads: bytes) -> None:
    answer = raw_request(api.port, b"GET /v1/models HTTP/1.1\r\n" + heads + b"Connection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400 "), answer


def test_settings_that_open_the_door_to_all_are_refused(api_settings: Settings) -> None:
    with pytest.raises(ValueError, match="CELERIAC_CORS_ORIGINS"):
        create_app(api_settings.model_copy(update={"cors_origins": "*"}), CATALOG)


def test_without_cors_origins_no_answer_lets_a_page_read(http: httpx.Client) -> None:
    for answer in (http.get("/v1/models"), http.get("/v1/models", headers={"origin": EVIL})):
        assert not [name for name in answer.headers if name.startswith("access-control-")]


class TestNamedPages:
    """`CELERIAC_CORS_ORIGINS` and `CELERIAC_ALLOWED_HOSTS`."""

    @pytest.fixture
    def api_settings(self, database_url: str, redis_url: str) -> Settings:
        return Settings(
            database_url=database_url, redis_url=redis_url, cors_origins=f"{PAGE}, null", allowed_hosts="llm.lan"
        )

    def test_a_preflight_of_a_named_page_is_granted_with_the_headers_that_it_asks_for(self, http: httpx.Client) -> None:
        wanted = "authorization, content-type, x-stainless-os, last-event-id, x-brand-new"
        for method in ("GET", "POST", "DELETE"):
            answer = http.options(
                "/v1/chat/completions",
                headers={
                    "origin": PAGE,
                    "access-control-request-method": method,
                    "access-control-request-headers": wanted,
                    "access-control-request-private-network": "true",
                },
            )
            assert answer.status_code == 200, answer.text
            assert answer.headers["access-control-allow-origin"] == PAGE
            assert answer.headers["access-control-allow-headers"] == wanted
            assert method in answer.headers["access-control-allow-methods"]
            assert answer.headers["access-control-allow-private-network"] == "true"
            assert "Origin" in answer.headers["vary"]

    def test_a_preflight_of_another_page_is_refused_in_our_shape(self, http: httpx.Client) -> None:
        for origin, method in ((EVIL, "POST"), (PAGE, "PATCH"), (f"{PAGE}:8443", "GET")):
            answer = http.options("/v1/jobs", headers={"origin": origin, "access-control-request-method": method})
            assert refused(answer)
            assert "access-control-allow-origin" not in answer.headers

    def test_a_named_page_reads_answers_refusals_and_streams(self, http: httpx.Client, hand_worker: HandWorker) -> None:
        page = {"origin": PAGE, "sec-fetch-site": "cross-site"}
        job_id = post_job(http)["id"]
        hand_worker.run(job_id, "hello")
        answers = [
            http.get("/v1/models", headers=page),
            http.get("/v1/nothing", headers=page),
            http.post("/v1/jobs", content=b"{", headers=page | {"content-type": "application/json"}),
            http.post("/v1/jobs", content=b" " * 2_000_000, headers=page),
            http.get(f"/v1/jobs/{job_id}/events", headers=page),
        ]
        assert [answer.status_code for answer in answers] == [200, 404, 400, 413, 200]
        for answer in answers:
            assert answer.headers["access-control-allow-origin"] == PAGE
            exposed = answer.headers["access-control-expose-headers"]
            assert all(name in exposed for name in ("x-job-id", "x-request-id", "retry-after"))
        assert refused(http.get("/v1/models", headers={"origin": EVIL}))
        assert http.get("/v1/models", headers={"origin": "null"}).headers["access-control-allow-origin"] == "null"

    def test_a_named_host_is_let_in(self, http: httpx.Client) -> None:
        assert http.get("/v1/models", headers={"host": "llm.lan:443"}).status_code == 200
        assert refused(http.get("/v1/models", headers={"host": "other.lan"}))


class TestWithKeys:
    @pytest.fixture
    def api_settings(self, database_url: str, redis_url: str) -> Settings:
        return Settings(database_url=database_url, redis_url=redis_url, auth="api_key", cors_origins="*")

    @pytest.fixture
    def key(self, session_factory: sessionmaker[Session]) -> str:
        with session_factory.begin() as session:
            return tenants.create_key(session, DEFAULT_TENANT_ID)

    @pytest.fixture
    def http(self, api: ApiServer, key: str) -> Iterator[httpx.Client]:
        with api.client(key) as client:
            yield client

    def test_any_name_leads_here_and_a_preflight_needs_no_key(self, api: ApiServer, http: httpx.Client) -> None:
        assert http.get("/v1/models", headers={"host": "llm.example.com"}).status_code == 200
        assert http.get("/v1/models", headers={"origin": EVIL}).headers["access-control-allow-origin"] == "*"
        with api.client() as stranger:
            asked = {"origin": EVIL, "access-control-request-method": "POST"}
            assert stranger.options("/v1/jobs", headers=asked).status_code == 200
            refusal = stranger.get("/v1/jobs", headers={"origin": EVIL})
            assert refusal.status_code == 401
            assert refusal.headers["access-control-allow-origin"] == "*", "or the page cannot read why"

    def test_metrics_are_for_admins(
        self, api: ApiServer, http: httpx.Client, session_factory: sessionmaker[Session]
    ) -> None:
        assert refused(http.get("/metrics"))
        with session_factory.begin() as session:
            admin_key = tenants.create_key(session, DEFAULT_TENANT_ID, scopes=Scope)
        with api.client(admin_key) as admin:
            assert "http_requests_total" in admin.get("/metrics").text

    def test_what_a_revoked_key_has_open_ends(
        self, http: httpx.Client, key: str, hand_worker: HandWorker, session_factory: sessionmaker[Session]
    ) -> None:
        job_id = post_job(http)["id"]
        job = hand_worker.claim(job_id)
        hand_worker.say(job, "before ")
        with open_events(http, job_id) as events:
            assert next(event for event in events if event.name == "output.delta").data["text"] == "before "
            revoke(session_factory, key)
            revoked_at = time.monotonic()
            for event in events:
                assert event.name != "job.completed"
            assert time.monotonic() - revoked_at < 10 * slowness(), "five seconds are promised"
        assert http.get(f"/v1/jobs/{job_id}").status_code == 401

    def test_a_revoked_key_is_told_nothing_by_a_call_or_a_long_poll_that_waited(
        self, api: ApiServer, http: httpx.Client, key: str, session_factory: sessionmaker[Session]
    ) -> None:
        job_id = post_job(http)["id"]
        with ThreadPoolExecutor(2) as threads:
            body = {"model": "fake", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 9}
            call = threads.submit(http.post, "/v1/chat/completions", json=body)
            poll = threads.submit(http.get, f"/v1/jobs/{job_id}", params={"wait": 8})
            wait_until(lambda: api.services.slots.num_taken == 2)
            revoke(session_factory, key)
            assert call.result().status_code == 401
            assert poll.result().status_code == 401


def revoke(sessions: sessionmaker[Session], key: str) -> None:
    with sessions.begin() as session:
        row = tenants.resolve_key(session, key)
        assert row is not None
        assert tenants.revoke_key(session, row.id, row.tenant_id)


class TestPages:
    @pytest.fixture(params=["none", "api_key"])
    def api_settings(self, database_url: str, redis_url: str, request: pytest.FixtureRequest) -> Settings:
        return Settings(database_url=database_url, redis_url=redis_url, auth=request.param)

    def test_pages_need_neither_a_key_nor_the_internet(self, http: httpx.Client) -> None:
        for path in ("/", "/docs"):
            page = http.get(path, headers={"accept": "text/html,*/*"})
            assert page.status_code == 200
            assert page.headers["content-type"].startswith("text/html")
            assert "frame-ancestors 'none'" in page.headers["content-security-policy"]
            assert "http" not in page.text.replace("http://127.0.0.1:8000", "").replace("http-equiv", ""), path
            for part in parts_of(page.text):
                assert http.get(f"/{part}").status_code == 200, part
        assert http.get("/openapi.json").json()["components"]["securitySchemes"]["key"]["scheme"] == "bearer"

    def test_a_program_gets_links_at_the_root(self, http: httpx.Client) -> None:
        links = http.get("/").json()["links"]
        assert links["documentation"] == "/docs"
        for path in links.values():
            assert http.get(path).status_code in (200, 401), path

    def test_nothing_but_the_pages_files_is_served(self, http: httpx.Client) -> None:
        for path in ("/static/", "/static/../settings.py", "/static/%2e%2e/app.py", "/static/nothing.js"):
            answer = http.get(path)
            assert answer.status_code == 404, path
            assert answer.json()["error"]["code"] == "not_found"


def parts_of(page: str) -> list[str]:
    """What the page brings along: relative, so that it works below a proxy's prefix."""
    return [part.split('"')[0] for mark in ('src="', 'rel="stylesheet" href="') for part in page.split(mark)[1:]]
