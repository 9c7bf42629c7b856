"""The limits of keys and tenants, on a real API, PostgreSQL and Redis: what is accepted, what is refused, and how."""

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import httpx
import pytest
from sqlalchemy import func, text, update
from sqlalchemy.orm import Session, sessionmaker

from domain.access import LIMIT_NAMES, Limits, Scope
from local.servers import EmbeddedRedis
from settings import Settings
from storage import administration, job_accept, limits, tenants
from storage.administration import KeyChanges, TenantChanges
from storage.job_accept import AcceptOutcome, NewJob
from storage.limits import LimitSet, LimitUse
from storage.tables import Tenant, TenantLoad
from tests.integration.api_harness import ApiServer, HandWorker, body, open_events, post_job
from tests.storage_samples import new_job
from tests.waiting import SECONDS, wait_until


@pytest.fixture
def api_settings(database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Settings:
    # A busy machine is not to answer 503 where a limit answers 429.
    for name in ("tasks.accept.ANSWER_SECONDS", "tasks.accept.STALLED_SECONDS", "api.services.ANSWER_SECONDS"):
        monkeypatch.setattr(name, SECONDS)
    monkeypatch.setattr("storage.database.POOL_TIMEOUT_SECONDS", SECONDS)
    return Settings(database_url=database_url, redis_url=redis_url, auth="api_key", no_workers_seconds=3600)


class Caller:
    """A client with a key of a tenant of its own."""

    def __init__(self, sessions: sessionmaker[Session], api: ApiServer, tenant: Tenant) -> None:
        self._sessions, self._api, self._tenant, self.tenant_id = sessions, api, tenant, tenant.id
        with sessions.begin() as session:
            self.key = tenants.create_key(session, tenant.id)
        self.key_id = self.key.split("_")[1]
        self.client = api.client(self.key)

    def another(self) -> "Caller":
        """With a key of its own."""
        return Caller(self._sessions, self._api, self._tenant)

    def limit_key(self, **given: int | None) -> None:
        with self._sessions.begin() as session:
            administration.change_key(session, self.key_id, KeyChanges(limits=Limits(**given)), actor="test")

    def limit_tenant(self, **given: int | None) -> None:
        changes = TenantChanges(limits=Limits(**given))
        with self._sessions.begin() as session:
            administration.change_tenant(session, self._tenant.name, changes, actor="test")

    def usage(self) -> tuple[int, int]:
        """Tokens of the day, by the key and by the tenant."""
        with self._sessions() as session:
            [of_key, of_tenant] = (
                session.get_one(limits.LimitUse, (self._tenant.id, id_)).tokens_on_day
                for id_ in (self.key_id, limits.OF_TENANT)
            )
        return of_key, of_tenant


@pytest.fixture
def make_caller(
    api: ApiServer,
    session_factory: sessionmaker[Session],
    make_tenant: Callable[..., Tenant],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[[], Caller]]:
    monkeypatch.setattr("api.authentication.REMEMBER_SECONDS", 0.0)  # changes apply to the next request
    made: list[Caller] = []

    def make() -> Caller:
        made.append(Caller(session_factory, api, make_tenant()))
        return made[-1]

    yield make
    for caller in made:
        caller.client.close()


def refused(client: httpx.Client, code: str, path: str = "/v1/jobs", **fields: Any) -> httpx.Response:
    answer = client.post(path, json=body(**fields))
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, code), answer.text
    assert answer.json()["error"]["param"] is None
    return answer


def test_without_limits_nothing_is_said_of_any(make_caller: Callable[[], Caller]) -> None:
    client = make_caller().client
    assert not [name for name in client.post("/v1/jobs", json=body()).headers if "ratelimit" in name]


def test_the_headers_count_down_to_a_refusal_that_says_when_there_is_room(make_caller: Callable[[], Caller]) -> None:
    caller = make_caller()
    caller.limit_key(requests_per_minute=2)
    for remaining in ("1", "0"):
        answer = caller.client.post("/v1/jobs", json=body())
        assert answer.status_code == 202
        assert answer.headers["x-ratelimit-limit-requests"] == "2"
        assert answer.headers["x-ratelimit-remaining-requests"] == remaining
    answer = refused(caller.client, "requests_per_minute_exceeded")
    assert answer.headers["x-ratelimit-remaining-requests"] == "0"
    assert answer.headers["x-ratelimit-reset-requests"] in {f"{seconds}s" for seconds in range(30, 60)} | {"1m0s"}
    assert 1 <= int(answer.headers["retry-after"]) <= 36
    assert answer.json()["error"]["type"] == "rate_limit_error"
    assert "your key may send 2 requests a minute" in answer.json()["error"]["message"]
    again = caller.client.post("/v1/jobs", json=body(prompt="other"), headers={"idempotency-key": "one"})
    assert again.status_code == 429
    assert caller.client.get("/v1/jobs").status_code == 200, "reading is not limited"
    caller.limit_key(requests_per_minute=None)
    assert caller.client.post("/v1/jobs", json=body()).status_code == 202


SURFACES: dict[str, dict[str, Any]] = {
    "/v1/jobs": {"prompt": "x"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
    "/v1/completions": {"prompt": "x"},
    "/v1/responses": {"input": "x"},
    "/v1/messages": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 4},
    "/generate": {"prompt": "x"},
    "/chat": {"prompt": "x"},
    "/api/v1/infer": {"prompt": "x"},
}


def test_every_surface_refuses_in_its_own_shape_with_its_own_headers(make_caller: Callable[[], Caller]) -> None:
    caller = make_caller()
    caller.limit_key(requests_per_minute=1, tokens_per_minute=1000)
    post_job(caller.client)
    for path, fields in SURFACES.items():
        answer = caller.client.post(path, json={"model": "large", **fields})
        assert answer.status_code == 429, (path, answer.text)
        error = answer.json()["error"]
        if path == "/v1/messages":
            assert (answer.json()["type"], error["type"]) == ("error", "rate_limit_error")
            assert error["details"] == {"error_code": "requests_per_minute_exceeded"}
            assert answer.headers["anthropic-ratelimit-requests-remaining"] == "0"
            assert answer.headers["anthropic-ratelimit-tokens-limit"] == "1000"
        else:
            assert (error["code"], error["param"]) == ("requests_per_minute_exceeded", None), path
            assert answer.headers["x-ratelimit-remaining-requests"] == "0"
            assert answer.headers["x-ratelimit-limit-tokens"] == "1000"
        assert int(answer.headers["retry-after"]) >= 1


def test_every_answer_to_a_key_says_what_is_left(make_caller: Callable[[], Caller]) -> None:
    caller = make_caller()
    caller.limit_key(requests_per_minute=5)
    caller.limit_tenant(tokens_per_minute=1000, streams=1)
    job_id = post_job(caller.client)["id"]
    chat = {"model": "large", "messages": [{"role": "user", "content": "x"}]}
    with open_events(caller.client, job_id):
        answers = [
            *(
                caller.client.get(path)
                for path in ("/v1/models", "/v1/jobs", f"/v1/jobs/{job_id}", "/v1/files", "/health")
            ),
            caller.client.get("/v1/jobs/job_nope"),
            caller.client.get(f"/v1/jobs/{job_id}/events"),  # 429 too_many_streams
            caller.client.post("/v1/chat/completions", json=chat | {"temperature": "hot"}),
            caller.client.post("/v1/chat/completions", json=chat | {"model": "nope"}),
            caller.client.post("/v1/chat/completions", json=chat),
            caller.client.post("/v1/batches", json={"input_file_id": "file_nope", "endpoint": "/v1/completions"}),
            caller.client.post("/tokenize", json={"model": "large", "prompt": "x"}),
            caller.client.get("/v1/admin/tenants"),
            caller.client.post("/v1/messages", json=chat),
        ]
    statuses = [answer.status_code for answer in answers]
    assert statuses == [200, 200, 200, 200, 200, 404, 429, 400, 404, 429, 400, 200, 403, 400]
    *others, of_anthropic = [answer for answer in answers if answer.request.url.path != "/health"]
    for answer in others:
        told = {name[12:]: text for name, text in answer.headers.items() if name.startswith("x-ratelimit-")}
        assert (told["limit-requests"], told["limit-tokens"]) == ("5", "1000"), answer.request.url
        assert told["remaining-requests"] in ("4", "5")
        assert 1000 - 21 <= int(told["remaining-tokens"]) <= 1000
    assert of_anthropic.headers["anthropic-ratelimit-requests-limit"] == "5"
    assert not [name for name in of_anthropic.headers if name.startswith("x-ratelimit-")]
    assert not [name for name in answers[4].headers if "ratelimit" in name], "nobody's key was looked at"
    token = caller.client.post(f"/v1/jobs/{job_id}/stream_token", json={}).json()["token"]
    caller.client.post(f"/v1/jobs/{job_id}/cancel")
    read = httpx.get(f"{caller.client.base_url}/v1/jobs/{job_id}/events", params={"token": token}, timeout=SECONDS)
    assert read.status_code == 200
    assert not [name for name in read.headers if "ratelimit" in name], "what is left is not for every reader of a job"


def test_of_50_at_once_exactly_10_are_accepted_and_only_they_count(
    make_caller: Callable[[], Caller], api: ApiServer
) -> None:
    caller, other = make_caller(), make_caller()
    caller.limit_tenant(requests_per_minute=10, tokens_per_minute=100_000)
    caller.client.get("/v1/models")

    async def send() -> list[httpx.Response]:
        headers = {"authorization": f"Bearer {caller.key}"}
        async with httpx.AsyncClient(base_url=api.url, headers=headers, timeout=60) as client:
            return await asyncio.gather(*(client.post("/v1/jobs", json=body()) for _ in range(50)))

    answers = asyncio.run(send())
    assert sorted(answer.status_code for answer in answers) == [202] * 10 + [429] * 40
    remaining = min(int(answer.headers["x-ratelimit-remaining-tokens"]) for answer in answers)
    assert 100_000 - 10 * 21 <= remaining <= 100_000 - 21, "5 of the prompt and 16 to come, less what filled up since"
    assert other.client.post("/v1/jobs", json=body()).status_code == 202, "another tenant's are its own"


def test_limits_hold_while_redis_is_away(make_caller: Callable[[], Caller], redis_server: EmbeddedRedis) -> None:
    caller = make_caller()
    caller.limit_key(requests_per_minute=3)
    redis_server.stop()
    try:
        statuses = [caller.client.post("/v1/jobs", json=body()).status_code for _ in range(5)]
    finally:
        redis_server.start()
    assert statuses == [202, 202, 202, 429, 429]


def test_tokens_are_charged_as_the_most_a_job_can_take_and_given_back(
    make_caller: Callable[[], Caller], hand_worker: HandWorker
) -> None:
    caller = make_caller()
    caller.limit_tenant(tokens_per_minute=50)
    first = caller.client.post("/v1/jobs", json=body())  # 5 tokens of the prompt, and 16 at most
    assert first.headers["x-ratelimit-remaining-tokens"] == "29"
    assert int(post_and_read(caller.client, "x-ratelimit-remaining-tokens")) <= 9
    answer = refused(caller.client, "tokens_per_minute_exceeded")
    assert "may take 21 tokens" in answer.json()["error"]["message"]
    hand_worker.run(first.json()["id"], "ab")
    assert int(post_and_read(caller.client, "x-ratelimit-remaining-tokens")) <= 9 + 14, "14 of the 16 were not taken"


def post_and_read(client: httpx.Client, header: str) -> str:
    answer = client.post("/v1/jobs", json=body())
    assert answer.status_code == 202, answer.text
    return answer.headers[header]


def test_a_full_queue_of_jobs_or_tokens_is_refused_until_there_is_room(
    make_caller: Callable[[], Caller], hand_worker: HandWorker
) -> None:
    caller = make_caller()
    caller.limit_key(queued_jobs=1)
    first = post_job(caller.client)["id"]
    refused(caller.client, "too_many_queued_jobs")
    caller.limit_key(queued_jobs=None, unfinished_jobs=2)
    second = post_job(caller.client)["id"]
    hand_worker.claim(first)
    answer = refused(caller.client, "too_many_unfinished_jobs")
    assert "2 jobs of your key are waiting or running, and unfinished_jobs is 2" in answer.json()["error"]["message"]
    caller.limit_key(unfinished_jobs=None, queued_tokens=50)
    post_job(caller.client)
    answer = refused(caller.client, "too_many_queued_tokens")
    assert "may take 42 tokens, this one 21" in answer.json()["error"]["message"]
    caller.client.post(f"/v1/jobs/{second}/cancel")
    post_job(caller.client)


def test_a_budget_counts_what_was_used_and_lasts_until_the_next_day(
    make_caller: Callable[[], Caller], hand_worker: HandWorker
) -> None:
    caller = make_caller()
    caller.limit_key(tokens_per_day=7)
    caller.limit_tenant(tokens_per_month=1000)
    hand_worker.run(post_job(caller.client)["id"], "a")  # 5 and 1
    assert caller.usage() == (6, 6)
    caller.client.post(f"/v1/jobs/{post_job(caller.client)['id']}/cancel")
    assert caller.usage() == (6, 6), "what has not run has used nothing"
    hand_worker.run(post_job(caller.client)["id"], "abc")
    assert caller.usage() == (14, 14)
    answer = refused(caller.client, "tokens_per_day_exceeded")
    assert answer.json()["error"]["type"] == "insufficient_quota"
    assert 1 <= int(answer.headers["retry-after"]) <= 86_400
    assert answer.headers["x-should-retry"] == "false"
    assert "your key has used 14 tokens today, and may use 7 a day" in answer.json()["error"]["message"]
    caller.limit_key(tokens_per_day=15)
    post_job(caller.client)
    caller.limit_tenant(tokens_per_month=14)
    refused(caller.client, "tokens_per_month_exceeded")


def test_a_budget_counts_what_was_used_before_it_was_set(
    make_caller: Callable[[], Caller], hand_worker: HandWorker
) -> None:
    caller = make_caller()
    hand_worker.run(post_job(caller.client)["id"], "abc")  # 5 and 3
    with caller.another().client as other:
        hand_worker.run(post_job(other)["id"], "a")
    caller.limit_key(tokens_per_day=9)
    caller.limit_tenant(tokens_per_month=15)
    assert caller.usage() == (8, 14)
    hand_worker.run(post_job(caller.client)["id"], "abc")
    assert caller.usage() == (16, 22)
    caller.limit_key(tokens_per_day=None)
    caller.limit_key(tokens_per_day=16)
    refused(caller.client, "tokens_per_day_exceeded")


def test_a_tenant_is_renamed_without_keeping_accepts_from_its_limits(
    session_factory: sessionmaker[Session], make_tenant: Callable[..., Tenant]
) -> None:
    tenant = make_tenant()
    changes = TenantChanges(name=f"{tenant.name}-new", limits=Limits(streams=3))
    with session_factory.begin() as session:
        administration.change_tenant(session, tenant.name, TenantChanges(limits=Limits(streams=4)), actor="test")

    def rename() -> str:
        with session_factory.begin() as session:
            return administration.change_tenant(session, tenant.name, changes, actor="test").name

    with ThreadPoolExecutor(1) as pool:
        with session_factory.begin() as accept:
            own = {"id": tenant.id}
            accept.execute(text("SELECT FROM limits WHERE tenant_id = :id FOR NO KEY UPDATE"), own)
            accepting = accept.scalar(text("SELECT pg_backend_pid()"))
            renamed = pool.submit(rename)
            blocked = text(
                "SELECT count(DISTINCT pid) FROM pg_locks WHERE NOT granted AND :pid = ANY(pg_blocking_pids(pid))"
            )
            assert wait_until(lambda: accept.scalar(blocked, {"pid": accepting}) == 1)
            accept.execute(text("SELECT FROM tenants WHERE id = :id FOR KEY SHARE NOWAIT"), own)  # as its jobs do
        assert renamed.result(SECONDS) == changes.name


def test_a_limit_is_set_although_the_ledger_cannot_be_summed_up(
    make_caller: Callable[[], Caller],
    session_factory: sessionmaker[Session],
    hand_worker: HandWorker,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caller = make_caller()
    hand_worker.run(post_job(caller.client)["id"], "abc")  # 5 and 3
    monkeypatch.setattr(limits, "COUNT_SECONDS", 0.05)
    seconds = text("SHOW statement_timeout")
    with session_factory.begin() as holder, session_factory.begin() as session:
        holder.execute(text("LOCK usage_records"))  # as long as it takes to read one that is too large
        before = session.execute(seconds).scalar_one()
        for given in (Limits(streams=3, queued_tokens=100), Limits(tokens_per_day=100)):
            assert not caplog.records
            limits.change_key_limits(session, caller.tenant_id, caller.key_id, given)
        assert session.execute(seconds).scalar_one() == before
    [logged] = caplog.records
    assert "begins at zero" in logged.message
    caller.limit_tenant(streams=3)
    assert caller.usage() == (0, 0), "neither was counted"
    monkeypatch.setattr(limits, "COUNT_SECONDS", SECONDS)
    caller.limit_key(tokens_per_month=100)
    hand_worker.run(post_job(caller.client)["id"], "abc")
    caller.limit_tenant(tokens_per_month=100)
    assert caller.usage() == (16, 16), "all of them were counted by then"


def test_a_key_is_told_what_is_left_of_its_limits(
    make_caller: Callable[[], Caller], api: ApiServer, session_factory: sessionmaker[Session], hand_worker: HandWorker
) -> None:
    caller = make_caller()
    none = dict.fromkeys(LIMIT_NAMES)
    nothing = {"limits": none, "left": none}
    assert caller.client.get("/v1/limits").json() == {"object": "limits", "key": nothing, "tenant": nothing}
    given = {"requests_per_minute": 10, "unfinished_jobs": 5, "queued_tokens": 100, "tokens_per_day": 7, "streams": 3}
    caller.limit_key(**given)
    caller.limit_tenant(queued_jobs=4, tokens_per_month=9)
    first, _ = (post_job(caller.client, params={"max_tokens": 16})["id"] for _ in range(2))
    hand_worker.run(first, "abc")  # 5 and 3
    with session_factory.begin() as session:
        admin = tenants.create_key(session, caller.tenant_id, scopes=[Scope.ADMIN])
        name = session.get_one(Tenant, caller.tenant_id).name
        session.execute(update(LimitSet).values(refilled_at=func.now() + timedelta(hours=1)))  # nothing is added
    told = caller.client.get("/v1/limits").json()
    assert told["key"]["limits"] == none | given
    left = {"requests_per_minute": 8, "unfinished_jobs": 4, "queued_tokens": 79, "tokens_per_day": 0}
    assert told["key"]["left"] == none | left
    assert told["tenant"]["left"] == none | {"queued_jobs": 3, "tokens_per_month": 1}
    with api.client(admin) as client:
        assert client.get(f"/v1/admin/keys/{caller.key_id}").json()["left"] == told["key"]["left"]
        assert client.get(f"/v1/admin/tenants/{name}").json()["left"] == told["tenant"]["left"]
    with session_factory.begin() as session:
        session.execute(update(LimitUse).values(day=LimitUse.day - 40))
    assert caller.client.get("/v1/limits").json()["tenant"]["left"]["tokens_per_month"] == 9, "another month"


def test_a_job_that_exists_is_found_again_whatever_the_limits(make_caller: Callable[[], Caller]) -> None:
    caller = make_caller()
    caller.limit_key(requests_per_minute=1)
    first = caller.client.post("/v1/jobs", json=body(), headers={"idempotency-key": "k"})
    again = caller.client.post("/v1/jobs", json=body(), headers={"idempotency-key": "k"})
    assert (first.status_code, again.headers["idempotent-replayed"]) == (202, "true")
    assert again.json()["id"] == first.json()["id"]


def test_a_call_of_several_jobs_is_one_request(make_caller: Callable[[], Caller]) -> None:
    caller = make_caller()
    post_job(caller.client)
    caller.limit_key(requests_per_minute=1, unfinished_jobs=3)
    refused_for_ever(caller, 4, "may take 4 jobs, and unfinished_jobs of your key is 3; send fewer prompts at once")
    caller.limit_key(tokens_per_minute=50)
    refused_for_ever(caller, 10, "tokens_per_minute of your key is 50; send fewer prompts at once")
    caller.limit_key(tokens_per_minute=None, unfinished_jobs=2)
    answer = several(caller, 2)  # of which one finds room
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "too_many_unfinished_jobs")
    caller.limit_key(unfinished_jobs=None)
    assert several(caller, 3, stream=True).status_code == 200, "nothing was charged for the refused one"
    assert several(caller, 3).json()["error"]["code"] == "requests_per_minute_exceeded"


def test_a_call_that_no_queue_can_hold_is_refused_for_ever(make_caller: Callable[[], Caller]) -> None:
    caller = make_caller()
    caller.limit_tenant(queued_jobs=3)
    message = "the 4 prompts of this request may take 4 jobs, and queued_jobs of your tenant is 3; send fewer prompts"
    refused_for_ever(caller, 4, message)
    request = {"model": "large", "prompts": ["a", "b", "c", "d"], "max_tokens": 4}
    answer = caller.client.post("/generate", json=request)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompts"), answer.text
    assert caller.client.get("/v1/jobs").json()["data"] == [], "no part of it was accepted"


def test_a_websocket_that_no_limit_leaves_a_response_is_refused(make_caller: Callable[[], Caller]) -> None:
    caller = make_caller()
    caller.limit_key(streams=1)
    handshake = {"connection": "upgrade", "upgrade": "websocket", "sec-websocket-version": "13"}
    answer = caller.client.get("/v1/responses", headers=handshake | {"sec-websocket-key": "AQIDBAUGBwgJCgsMDQ4PEA=="})
    assert answer.status_code == 400, answer.text
    assert "takes 2 streams, and streams of your key is 1" in answer.json()["error"]["message"]


def test_a_full_queue_says_when_it_will_have_room(
    make_caller: Callable[[], Caller], hand_worker: HandWorker, session_factory: sessionmaker[Session]
) -> None:
    caller = make_caller()
    caller.limit_tenant(queued_jobs=2)
    first = post_job(caller.client)["id"]
    post_job(caller.client)
    hand_worker.claim(first)
    with session_factory.begin() as session:  # it waited for 40 s while the queue of two passed
        session.execute(text("UPDATE jobs SET created_at = started_at - interval '40 s' WHERE status = 'in_progress'"))
    post_job(caller.client)
    answer = refused(caller.client, "too_many_queued_jobs")
    assert 20 <= int(answer.headers["retry-after"]) <= 24, "one job every 20 s"
    message = "2 of your jobs wait, this request adds 1, and queued_jobs of your tenant is 2; retry when some have"
    assert message in answer.json()["error"]["message"]


def several(caller: Caller, num_prompts: int, **fields: Any) -> httpx.Response:
    """The beginning of the answer to one call with several prompts."""
    prompts = [f"prompt {number}" for number in range(num_prompts)]
    request = {"model": "large", "prompt": prompts, "max_tokens": 4} | fields
    with caller.client.stream("POST", "/v1/completions", json=request) as answer:
        if answer.status_code != 200:
            answer.read()
        return answer


def refused_for_ever(caller: Caller, num_prompts: int, message: str) -> None:
    answer = several(caller, num_prompts)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_value"), answer.text
    assert message in answer.json()["error"]["message"]


def accept(sessions: sessionmaker[Session], *new_jobs: NewJob) -> list[AcceptOutcome]:
    with sessions.begin() as session:
        return [accepted.outcome for accepted in job_accept.accept(session, new_jobs, max_queued_jobs=1000)]


@pytest.mark.parametrize("name", ["requests_per_minute", "unfinished_jobs", "queued_tokens"])
def test_jobs_that_exist_take_no_room_from_new_ones_beside_them(
    make_caller: Callable[[], Caller], session_factory: sessionmaker[Session], name: str
) -> None:
    caller = make_caller()
    first, *others = (new_job(tenant_id=caller.tenant_id, key_id=caller.key_id, is_limited=True) for _ in range(3))
    room = 2 * first.cost if name == "queued_tokens" else 2
    caller.limit_key(**{name: room})
    assert accept(session_factory, first) == [AcceptOutcome.ACCEPTED]
    outcomes = accept(session_factory, first, others[0], others[0], others[1])
    assert outcomes[:3] == [AcceptOutcome.DUPLICATE, AcceptOutcome.ACCEPTED, AcceptOutcome.DUPLICATE]
    assert outcomes[3] is AcceptOutcome.LIMIT_REACHED


def test_jobs_of_a_whole_tenant_are_counted_by_its_counters(
    make_caller: Callable[[], Caller], session_factory: sessionmaker[Session]
) -> None:
    """They are exact, and reading each job would take longer the more there are."""
    caller = make_caller()
    caller.limit_tenant(unfinished_jobs=5)
    with session_factory.begin() as session:
        load = session.get_one(TenantLoad, caller.tenant_id)
        load.num_queued, load.num_running = 3, 2
    answer = refused(caller.client, "too_many_unfinished_jobs")
    assert "5 jobs of your tenant are waiting or running" in answer.json()["error"]["message"]


def test_tokens_that_wait_are_counted_once_a_tenant_has_a_limit_on_them(
    make_caller: Callable[[], Caller], session_factory: sessionmaker[Session]
) -> None:
    """Before, processes of an earlier release may have changed the queue, which counted them nowhere."""
    caller = make_caller()
    first = post_job(caller.client)["id"]
    no_count = update(TenantLoad).where(TenantLoad.tenant_id == caller.tenant_id).values(num_queued_tokens=0)
    with session_factory.begin() as session:
        session.execute(no_count)
    caller.limit_tenant(queued_tokens=50)
    post_job(caller.client)
    answer = refused(caller.client, "too_many_queued_tokens")
    assert "the jobs of your tenant that wait may take 42 tokens, this one 21" in answer.json()["error"]["message"]
    with session_factory.begin() as session:
        session.execute(no_count)
    with session_factory.begin() as session:
        assert limits.count_queued_tokens(session)
    refused(caller.client, "too_many_queued_tokens")
    caller.client.post(f"/v1/jobs/{first}/cancel")
    post_job(caller.client)


def test_streams_of_a_key_are_counted_and_its_stream_tokens_too(make_caller: Callable[[], Caller]) -> None:
    caller = make_caller()
    caller.limit_key(streams=1)
    job_id = post_job(caller.client)["id"]
    token = caller.client.post(f"/v1/jobs/{job_id}/stream_token", json={}).json()["token"]
    with open_events(caller.client, job_id) as events:
        next(events)
        for headers, parameters in ((caller.client.headers, {}), ({}, {"token": token})):
            url = f"{caller.client.base_url}/v1/jobs/{job_id}/events"
            answer = httpx.get(url, headers=headers, params=parameters, timeout=SECONDS)
            assert (answer.status_code, answer.json()["error"]["code"]) == (429, "too_many_streams")
            assert "1 stream of your key is open here" in answer.json()["error"]["message"]


def test_where_no_key_is_required_the_default_tenant_has_limits(
    database_url: str, redis_url: str, session_factory: sessionmaker[Session]
) -> None:
    with session_factory.begin() as session:
        administration.change_tenant(
            session, "default", TenantChanges(limits=Limits(requests_per_minute=1)), actor="test"
        )
    with ApiServer(Settings(database_url=database_url, redis_url=redis_url)) as server, server.client() as client:
        assert client.post("/v1/jobs", json=body()).status_code == 202
        refused(client, "requests_per_minute_exceeded")
