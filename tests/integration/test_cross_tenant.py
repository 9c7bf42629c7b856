"""For every route of the OpenAPI document: what one tenant has does not exist for another one.

With another tenant's real ids each route answers as for ids that nobody has, no list contains anything of another
tenant, and nothing that was tried has changed it.
"""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from sqlalchemy.orm import Session, sessionmaker

from api.openapi import document_of
from settings import Settings
from storage import tenants
from storage.tables import Tenant
from tests.integration.api_harness import ApiServer, HandWorker

CANARY = "canary-of-one-tenant"

OF_THE_INSTALLATION = ("/v1/models/", "/v1/admin/")  # whose ids belong to no tenant

BODIES: dict[str, Any] = {
    "/v1/conversations/{conversation_id}": {"metadata": {"a": "b"}},
    "/v1/conversations/{conversation_id}/items": {"items": [{"role": "user", "content": "Hi"}]},
    "/v1/chat/completions/{completion_id}": {"metadata": {"a": "b"}},
    "/v1/webhook_endpoints/{webhook_endpoint_id}": {"name": "other"},
    "/v1/webhook_endpoints/{webhook_endpoint_id}/test": {"event_type": "job.completed"},
}


@pytest.fixture
def api_settings(database_url: str, redis_url: str) -> Settings:
    return Settings(database_url=database_url, redis_url=redis_url, auth="api_key", webhook_private_targets=True)


@pytest.fixture
def clients(
    api: ApiServer, session_factory: sessionmaker[Session], make_tenant: Callable[..., Tenant]
) -> Iterator[tuple[httpx.Client, httpx.Client]]:
    with session_factory.begin() as session:
        keys = [tenants.create_key(session, make_tenant().id) for _ in range(2)]
    with api.client(keys[0]) as owner, api.client(keys[1]) as other:
        yield owner, other


def made(answer: httpx.Response) -> dict[str, Any]:
    assert answer.status_code in (200, 201, 202), answer.text
    body: dict[str, Any] = answer.json()
    return body


def complete(worker: HandWorker, job_id: str) -> None:
    job = worker.claim(job_id)
    worker.say(job, CANARY)
    worker.finish(job, CANARY)


@pytest.fixture
def ids(clients: tuple[httpx.Client, httpx.Client], hand_worker: HandWorker) -> dict[str, str]:
    """One of everything, by the names of the parameters in paths."""
    owner, _ = clients
    hook = {"name": CANARY, "url": "https://localhost:8443/canary", "event_types": ["job.completed"]}
    endpoint_id = made(owner.post("/v1/webhook_endpoints", json=hook))["id"]
    job_id = made(owner.post("/v1/jobs", json={"model": "large", "prompt": CANARY}))["id"]
    complete(hand_worker, job_id)
    response = {"model": "large", "input": CANARY, "background": True}
    response_id = made(owner.post("/v1/responses", json=response))["id"]
    chat = {"model": "large", "messages": [{"role": "user", "content": CANARY}], "store": True, "stream": True}
    with owner.stream("POST", "/v1/chat/completions", json=chat) as answer:  # it goes on without its reader
        chat_job_id = answer.headers["x-job-id"]
    complete(hand_worker, chat_job_id)
    conversation = {"items": [{"role": "user", "content": CANARY}], "metadata": {"a": CANARY}}
    conversation_id = made(owner.post("/v1/conversations", json=conversation))["id"]
    line = {"custom_id": CANARY, "method": "POST", "url": "/v1/completions", "body": {"model": "large", "prompt": "a"}}
    files = {"file": (f"{CANARY}.jsonl", json.dumps(line).encode())}
    file_id = made(owner.post("/v1/files", files=files, data={"purpose": "batch"}))["id"]
    batch = {"input_file_id": file_id, "endpoint": "/v1/completions", "completion_window": "24h"}
    message = {"model": "large", "max_tokens": 1, "messages": [{"role": "user", "content": CANARY}]}
    message_batch = {"requests": [{"custom_id": CANARY, "params": message}]}
    return {
        "job_id": job_id,
        "response_id": response_id,
        "completion_id": made(owner.get("/v1/chat/completions"))["data"][0]["id"],
        "conversation_id": conversation_id,
        "item_id": made(owner.get(f"/v1/conversations/{conversation_id}/items"))["data"][0]["id"],
        "file_id": file_id,
        "batch_id": made(owner.post("/v1/batches", json=batch))["id"],
        "message_batch_id": made(owner.post("/v1/messages/batches", json=message_batch))["id"],
        "webhook_endpoint_id": endpoint_id,
        "delivery_id": made(owner.get("/v1/webhook_deliveries"))["data"][0]["id"],
    }


def of_nobody(id_: str) -> str:
    """A well-formed id of the same kind."""
    return re.sub(r"[0-9A-Za-z]{8}$", "00000000", id_)


def everything_of(owner: httpx.Client, paths: dict[str, Any], ids: dict[str, str]) -> dict[str, tuple[int, str]]:
    """What the owner reads at every path with an id that is not a stream."""
    return {
        path: (answer.status_code, re.sub(r"req_\w+", "", answer.text))
        for path, operations in paths.items()
        if "get" in operations and "{" in path and not path.endswith(("/events", "/stream")) and is_of_tenants(path)
        for answer in [owner.get(path.format(**ids))]
    }


def is_of_tenants(path: str) -> bool:
    return not path.startswith(OF_THE_INSTALLATION)


def test_nothing_of_another_tenant_exists(
    api: ApiServer, clients: tuple[httpx.Client, httpx.Client], ids: dict[str, str]
) -> None:
    owner, other = clients
    paths: dict[str, Any] = json.loads(json.dumps(document_of(api.app)))["paths"]
    before = everything_of(owner, paths, ids)
    assert {status for status, _ in before.values()} <= {200, 400}, before
    num_tried = 0
    for path, operations in paths.items():
        if "{" not in path or not is_of_tenants(path):
            continue
        assert set(re.findall(r"{(\w+)}", path)) <= set(ids), f"make one for {path} in the fixture above"
        for method in operations:
            unknown, real = (
                other.request(method, path.format(**given), json=BODIES.get(path) if method == "post" else None)
                for given in ({name: of_nobody(id_) for name, id_ in ids.items()}, ids)
            )
            about = (method, path, real.text)
            assert real.status_code == unknown.status_code == 404, about
            masked = [re.sub(r"'[^']*'|req_\w+", "_", answer.text) for answer in (real, unknown)]
            assert masked[0] == masked[1], about
            assert CANARY not in real.text, about
            assert set(real.headers) == set(unknown.headers), about
            num_tried += 1
    assert num_tried >= 30
    assert everything_of(owner, paths, ids) == before, "a refused request has changed something"


def test_no_list_has_anything_of_another_tenant(
    api: ApiServer, clients: tuple[httpx.Client, httpx.Client], ids: dict[str, str]
) -> None:
    owner, other = clients
    paths: dict[str, Any] = json.loads(json.dumps(document_of(api.app)))["paths"]
    lists = [path for path, operations in paths.items() if "get" in operations and "{" not in path]
    num_seen = 0
    for path in lists:
        names = {parameter["name"] for parameter in paths[path]["get"].get("parameters", ())}
        queries: list[dict[str, str]] = [{}]
        queries += [{name: id_} for name in ("after", "after_id", "before_id") if name in names for id_ in ids.values()]
        queries += [{"metadata[a]": CANARY}] if "metadata" in names else []
        num_seen += CANARY in owner.get(path).text
        for query in queries:
            text = other.get(path, params=query).text
            assert not [id_ for id_ in ids.values() if id_ in text and id_ not in query.values()], (path, query)
            assert CANARY not in text, (path, query)
    assert len(lists) >= 12
    assert num_seen >= 3, "the owner sees what the others must not see"
