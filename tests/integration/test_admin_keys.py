"""/v1/admin/tenants, /v1/admin/keys, the audit log, `celeriac tenants` and `celeriac keys`, and the scopes of keys."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner
from fastapi.routing import APIRoute
from sqlalchemy import text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session, sessionmaker

from api.scopes import SCOPE_BY_ROUTE, scope_of
from celeriac import cli
from domain.access import Scope, opened_by
from settings import Settings, get_settings
from storage import administration, tenants
from storage.tables import DEFAULT_TENANT_ID
from tests.integration.api_harness import ApiServer, HandWorker, open_events, post_job
from tests.waiting import slowness


@pytest.fixture
def api_settings(database_url: str, redis_url: str) -> Settings:
    return Settings(database_url=database_url, redis_url=redis_url, auth="api_key")


@pytest.fixture
def admin(api: ApiServer, session_factory: sessionmaker[Session]) -> Iterator[httpx.Client]:
    with session_factory.begin() as session:
        key = tenants.create_key(session, DEFAULT_TENANT_ID, scopes=Scope)
    with api.client(key) as client:
        yield client


def make_key(admin: httpx.Client, **fields: Any) -> dict[str, Any]:
    answer = admin.post("/v1/admin/keys", json=fields)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def make_tenant_of(admin: httpx.Client, name: str, **fields: Any) -> dict[str, Any]:
    answer = admin.post("/v1/admin/tenants", json={"name": name, **fields})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def test_a_route_without_a_scope_cannot_be_made() -> None:
    with pytest.raises(ValueError, match=r"POST /v1/brand_new has no scope; add it to the table in api/scopes.py"):
        scope_of(["POST"], "/v1/brand_new")


def test_every_scope_opens_its_own_routes_alone(api: ApiServer, admin: httpx.Client) -> None:
    """What a route answers to a key with its scope is its own affair; without it, it is always a refusal."""
    routes = {
        f"{method} {route.path}"
        for route in api.app.routes
        if isinstance(route, APIRoute)
        for method in route.methods or ()
        if hasattr(route, "scope") and route.scope is not None
    }
    assert routes == set(SCOPE_BY_ROUTE), "the table has no scope for a route, or one for a route that is gone"
    clients = {scope: api.client(make_key(admin, scopes=[scope])["key"]) for scope in Scope}
    for route, scope in SCOPE_BY_ROUTE.items():
        method, path = route.split(" ")
        path = path.replace("{job_id}", "job_" + "0" * 26)
        for held, client in clients.items():
            status = client.request(method, path).status_code
            is_opened = scope in opened_by(frozenset({held}))
            assert (status == 403) is not is_opened, (route, held, status)
    assert {held for held, client in clients.items() if client.get("/metrics").status_code == 200} == {
        Scope.METRICS,
        Scope.ADMIN,
    }
    refusal = clients[Scope.READ].post("/v1/jobs", json={}).json()["error"]
    assert refusal["code"] == "permission_denied"
    assert (
        "the scope submit, and yours has read; use one made with: celeriac keys create --scope submit"
        in refusal["message"]
    )
    for client in clients.values():
        client.close()


def test_a_key_is_told_what_it_may_do(api: ApiServer, admin: httpx.Client) -> None:
    for scopes, held in ((["read"], ["read"]), (["admin", "cancel"], ["admin", "cancel", "metrics"])):
        made = make_key(admin, scopes=scopes)
        with api.client(made["key"]) as client:
            assert client.get("/v1/key").json() == {"object": "api_key", "id": made["id"], "scopes": held}


def test_tenants_and_keys_are_renamed_and_keep_what_is_theirs(api: ApiServer, admin: httpx.Client) -> None:
    make_tenant_of(admin, "reserch", limits={"streams": 3})
    make_tenant_of(admin, "other")
    key = make_key(admin, tenant="reserch", name="ci")
    with api.client(key["key"]) as client:
        job = post_job(client)
        renamed = admin.post("/v1/admin/tenants/reserch", json={"name": "research"}).json()
        assert (renamed["id"], renamed["name"], renamed["limits"]["streams"]) == ("research", "research", 3)
        assert client.get(f"/v1/jobs/{job['id']}").status_code == 200
    assert admin.get("/v1/admin/tenants/reserch").status_code == 404
    assert admin.get("/v1/admin/keys", params={"tenant": "research"}).json()["data"][0]["id"] == key["id"]
    changed = admin.post(f"/v1/admin/keys/{key['id']}", json={"name": "nightly"}).json()
    assert (changed["name"], changed["tenant"], changed["status"]) == ("nightly", "research", "valid")
    assert admin.post(f"/v1/admin/keys/{key['id']}", json={"enabled": True}).json()["name"] == "nightly"
    for tenant, name in (("research", "other"), ("research", "not a name"), ("research", ""), ("default", "mine")):
        refused = admin.post(f"/v1/admin/tenants/{tenant}", json={"name": name})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "name"), refused.text
    assert admin.post(f"/v1/admin/keys/{key['id']}", json={"name": "x" * 257}).status_code == 400
    assert admin.post("/v1/admin/tenants/research", json={"name": "research"}).status_code == 200
    audit = [(entry["tenant"], entry["changes"]) for entry in admin.get("/v1/admin/audit").json()["data"]]
    assert ("reserch", {"name": "research"}) in audit
    assert ("research", {"name": "nightly", "old_name": "ci"}) in audit


def test_a_tenant_is_made_limited_disabled_and_deleted(api: ApiServer, admin: httpx.Client) -> None:
    made = make_tenant_of(admin, "research", weight=2, limits={"queued_jobs": 1, "tokens_per_day": 500})
    assert (made["weight"], made["limits"]["queued_jobs"], made["limits"]["tokens_per_day"]) == (2, 1, 500)
    assert [tenant["name"] for tenant in admin.get("/v1/admin/tenants").json()["data"]] == ["default", "research"]
    again = admin.post("/v1/admin/tenants", json={"name": "research"})
    assert (again.status_code, again.json()["error"]["param"]) == (400, "name")
    key = make_key(admin, tenant="research")["key"]
    with api.client(key) as client:
        job = post_job(client)
        assert client.post("/v1/jobs", json={"model": "fake", "prompt": "x"}).json()["error"]["code"] == (
            "too_many_queued_jobs"
        )
        changed = admin.post("/v1/admin/tenants/research", json={"limits": {"streams": 3}}).json()
        assert (changed["limits"]["queued_jobs"], changed["limits"]["streams"], changed["weight"]) == (None, 3, 2)
        refused = admin.delete("/v1/admin/tenants/research")
        assert (refused.status_code, "still has jobs" in refused.text) == (400, True)
        assert client.delete(f"/v1/jobs/{job['id']}").status_code == 200
    assert admin.post("/v1/admin/tenants/research", json={"enabled": False}).json()["enabled"] is False
    with api.client(make_key(admin, tenant="research")["key"]) as client:
        assert client.get("/v1/jobs").status_code == 401
    assert admin.delete("/v1/admin/tenants/research").json()["deleted"] is True
    assert admin.get("/v1/admin/tenants/research").status_code == 404
    assert admin.delete("/v1/admin/tenants/default").status_code == 400


def test_a_key_is_made_disabled_rotated_and_deleted(
    api: ApiServer, admin: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.authentication.REMEMBER_SECONDS", 0.0)
    asked = {"limits": {"requests_per_minute": 5}, "max_priority": 3, "expires_in_seconds": 3600}
    made = make_key(admin, name="laptop", **asked)
    assert (made["max_priority"], make_key(admin)["max_priority"]) == (3, 10)
    assert made["key"].startswith(f"sk_{made['id']}_")
    shown = admin.get(f"/v1/admin/keys/{made['id']}").json()
    assert shown.pop("left")["requests_per_minute"] == 5
    assert shown == {name: value for name, value in made.items() if name != "key"}
    with api.client(made["key"]) as client:
        for is_enabled, status in ((False, 401), (True, 200)):
            assert admin.post(f"/v1/admin/keys/{made['id']}", json={"enabled": is_enabled}).status_code == 200
            assert client.get("/v1/jobs").status_code == status
        new = admin.post(f"/v1/admin/keys/{made['id']}/rotate").json()
        assert {**new, "id": "", "key": "", "created_at": ""} == {**made, "id": "", "key": "", "created_at": ""}
        assert client.get("/v1/jobs").status_code == 401
    asked = {"keep_old_seconds": 600, "expires_in_seconds": 7200}
    kept = admin.post(f"/v1/admin/keys/{new['id']}/rotate", json=asked).json()
    assert kept["expires_at"] > new["expires_at"]
    for key in (new["key"], kept["key"]):
        with api.client(key) as client:
            assert client.get("/v1/jobs").status_code == 200
    assert admin.post(f"/v1/admin/keys/{kept['id']}", json={"max_priority": 0}).json()["max_priority"] == 0
    assert admin.post(f"/v1/admin/keys/{made['id']}/rotate").status_code == 400
    assert admin.delete(f"/v1/admin/keys/{kept['id']}").json()["deleted"] is True
    with api.client(kept["key"]) as client:
        assert client.get("/v1/jobs").status_code == 401


@pytest.mark.parametrize("way", ["key disabled", "key rotated", "tenant disabled", "key deleted"])
def test_an_open_stream_ends_with_its_key(
    api: ApiServer, admin: httpx.Client, hand_worker: HandWorker, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr("api.authentication.RECHECK_SECONDS", 0.05)
    name = way.replace(" ", "-")
    make_tenant_of(admin, name)
    made = make_key(admin, tenant=name)
    with api.client(made["key"]) as client:
        job = post_job(client)
        with open_events(client, job["id"]) as events:
            next(events)
            if way == "key disabled":
                admin.post(f"/v1/admin/keys/{made['id']}", json={"enabled": False})
            elif way == "key rotated":
                admin.post(f"/v1/admin/keys/{made['id']}/rotate")
            elif way == "tenant disabled":
                admin.post(f"/v1/admin/tenants/{name}", json={"enabled": False})
            else:
                admin.delete(f"/v1/admin/keys/{made['id']}")
            changed_at = time.monotonic()
            assert all(event.name != "job.completed" for event in events)
            assert time.monotonic() - changed_at < 5 * slowness()


def test_a_chat_stream_says_that_its_key_has_ended(
    api: ApiServer, admin: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.authentication.RECHECK_SECONDS", 0.05)
    make_tenant_of(admin, "ended")
    made = make_key(admin, tenant="ended")
    chat = {"model": "fake", "messages": [{"role": "user", "content": "a"}], "stream": True}
    with api.client(made["key"]) as client, client.stream("POST", "/v1/chat/completions", json=chat) as response:
        assert response.status_code == 200
        admin.post(f"/v1/admin/keys/{made['id']}", json={"enabled": False})
        assert "this API key was revoked" in response.read().decode()


def test_a_key_whose_tenant_was_deleted_a_moment_ago_is_refused(api: ApiServer, admin: httpx.Client) -> None:
    make_tenant_of(admin, "brief")
    with api.client(make_key(admin, tenant="brief")["key"]) as client:
        assert client.get("/v1/limits").status_code == 200
        assert admin.delete("/v1/admin/tenants/brief").status_code < 300
        assert client.get("/v1/limits").status_code == 401


def test_the_audit_log_names_actor_and_change_but_no_key(admin: httpx.Client) -> None:
    make_tenant_of(admin, "audited", weight=3)
    made = make_key(admin, tenant="audited", name="ci", scopes=["read"])
    admin.post(f"/v1/admin/keys/{made['id']}", json={"limits": {"streams": 2}})
    new = admin.post(f"/v1/admin/keys/{made['id']}/rotate").json()
    admin.delete(f"/v1/admin/keys/{new['id']}")
    first = admin.get("/v1/admin/audit", params={"limit": 3}).json()
    assert first["has_more"] is True
    second = admin.get("/v1/admin/audit", params={"limit": 2, "after": first["last_id"]}).json()
    entries = [*first["data"], *second["data"]]
    actions = ["key.delete", "key.rotate", "key.change", "key.create", "tenant.create"]
    assert [entry["action"] for entry in entries] == actions
    assert {entry["tenant"] for entry in entries} == {"audited"}
    assert all(entry["actor"].startswith("key ") for entry in entries)
    assert entries[1]["changes"] == {"new_key_id": new["id"]}
    assert entries[2]["changes"]["limits"]["streams"] == 2
    assert entries[3]["changes"] == {"name": "ci", "scopes": ["read"]}
    assert made["key"].split("_", 2)[2] not in json.dumps(entries)
    for after in ("x", "-1", "9" * 30, "1;drop"):
        assert admin.get("/v1/admin/audit", params={"after": after}).json()["error"]["code"] == "invalid_cursor"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/admin/tenants", {"name": ""}, "name"),
        ("/v1/admin/tenants", {"name": "a/b"}, "name"),
        ("/v1/admin/tenants", {"name": "x" * 65}, "name"),
        ("/v1/admin/tenants", {"name": "n", "weight": 0}, "weight"),
        ("/v1/admin/tenants", {"name": "n", "weight": 1e9}, "weight"),
        ("/v1/admin/tenants", {"name": "n", "weight": 1e-300}, "weight"),
        ("/v1/admin/tenants", {"name": "n", "max_priority": 2**31}, "max_priority"),
        ("/v1/admin/keys", {"max_priority": 11}, "max_priority"),
        ("/v1/admin/tenants", {"name": "n", "retention_seconds": 59}, "retention_seconds"),
        ("/v1/admin/tenants", {"name": "n", "retention_seconds": 2**31}, "retention_seconds"),
        ("/v1/admin/tenants", {"name": "n", "limits": {"streams": 0}}, "limits.streams"),
        ("/v1/admin/tenants", {"name": "n", "limits": {"queued_jobs": 2**31}}, "limits.queued_jobs"),
        ("/v1/admin/tenants/default", {"limits": {"queued_jobs": 2**31}}, "limits.queued_jobs"),
        ("/v1/admin/keys", {"limits": {"queued_jobs": 2**31}}, "limits.queued_jobs"),
        ("/v1/admin/tenants", {"name": "n", "limits": {"tokens_per_day": 2**70}}, "limits.tokens_per_day"),
        ("/v1/admin/tenants", {"name": "n", "limits": {"rpm": 1}}, "limits.rpm"),
        ("/v1/admin/keys", {"scopes": []}, "scopes"),
        ("/v1/admin/keys", {"scopes": ["root"]}, "scopes.0"),
        ("/v1/admin/keys", {"expires_in_seconds": 0}, "expires_in_seconds"),
        ("/v1/admin/keys", {"expires_in_seconds": 2**40}, "expires_in_seconds"),
        ("/v1/admin/keys/any/rotate", {"keep_old_seconds": 2**40}, "keep_old_seconds"),
        ("/v1/admin/keys", {"name": "a\0b"}, "name"),
    ],
)
def test_a_wrong_field_is_named(admin: httpx.Client, path: str, body: dict[str, Any], param: str) -> None:
    answer = admin.post(path, json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_the_largest_limits_are_stored(admin: httpx.Client) -> None:
    largest = {"queued_jobs": 2**31 - 1, "tokens_per_month": 2**53, "streams": 2**53}
    assert make_tenant_of(admin, "vast", limits=largest)["limits"].items() >= largest.items()
    assert make_key(admin, tenant="vast", limits=largest)["limits"].items() >= largest.items()


def test_a_tenant_changes_while_its_jobs_are_accepted(
    admin: httpx.Client, session_factory: sessionmaker[Session]
) -> None:
    """An accept holds the limits and refers to the tenant; a change holds the tenant and needs the limits."""
    make_tenant_of(admin, "busy")
    with session_factory() as changing, session_factory() as accepting:
        tenant = administration.find_tenant(changing, "busy", is_locked=True)
        accepting.execute(text("SET LOCAL lock_timeout = 1"))  # milliseconds: it must not have to wait
        accepting.execute(text("SELECT FROM tenants WHERE id = :id FOR KEY SHARE"), {"id": tenant.id})


def test_a_tenant_is_not_locked_by_a_deletion_that_waits_for_an_accept(
    admin: httpx.Client, session_factory: sessionmaker[Session]
) -> None:
    make_tenant_of(admin, "going", limits={"requests_per_minute": 1})
    for table in ("limits", "tenant_load"):
        with session_factory() as deleting, session_factory() as accepting:
            tenant = administration.find_tenant(accepting, "going")
            accepting.execute(text(f"SELECT FROM {table} WHERE tenant_id = :id FOR NO KEY UPDATE"), {"id": tenant.id})
            deleting.execute(text("SET LOCAL lock_timeout = 1"))
            with pytest.raises(OperationalError, match=f'relation "{table}"'):  # which it asks for before the tenant
                administration.delete_tenant(deleting, "going", actor="test")
    with session_factory.begin() as session:
        administration.delete_tenant(session, "going", actor="test")


def test_names_that_do_not_exist_are_not_found(admin: httpx.Client) -> None:
    assert admin.post("/v1/admin/keys", json={"tenant": "nobody"}).status_code == 404
    for path in ("tenants/nobody", "tenants/a%00b", "keys/nobody", "keys/%00", "keys?tenant=%00", "keys?tenant=nobody"):
        assert admin.get(f"/v1/admin/{path}").status_code == 404, path
    assert admin.get("/v1/admin/keys?after=nobody").status_code == 400


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, database_url: str) -> Iterator[Callable[..., Any]]:
    monkeypatch.setenv("CELERIAC_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("CELERIAC_DATABASE_URL", database_url)
    get_settings.cache_clear()
    yield lambda *arguments: CliRunner().invoke(cli.main, list(arguments))
    get_settings.cache_clear()


def test_the_commands_do_what_the_routes_do(run: Callable[..., Any]) -> None:
    options = ("--weight", "2", "--retention-seconds", "3600", "--tokens-per-day", "1000")
    assert run("tenants", "create", "lab", *options).exit_code == 0
    shown = json.loads(run("tenants", "show", "lab", "--json").output)
    assert (shown["weight"], shown["retention_seconds"], shown["limits"]["tokens_per_day"]) == (2, 3600, 1000)
    assert run("tenants", "limit", "lab", "--tokens-per-day", "none", "--queued-jobs", "7").exit_code == 0
    assert "queued_jobs 7" in run("tenants", "list").output
    made = json.loads(run("keys", "create", "--tenant", "lab", "--scope", "read", "--streams", "2", "--json").output)
    assert (made["scopes"], made["limits"]["streams"]) == (["read"], 2)
    assert run("keys", "limit", made["id"], "--streams", "3").exit_code == 0
    assert json.loads(run("keys", "show", made["id"], "--json").output)["limits"]["streams"] == 3
    assert run("keys", "disable", made["id"]).exit_code == 0
    assert "disabled" in run("keys", "list", "--all").output
    assert "tokens_per_day" not in run("tenants", "show", "lab").output
    assert run("keys", "enable", made["id"]).exit_code == 0
    shown = run("keys", "show", made["id"]).output
    assert ("expires_at   none" in shown, "streams 3" in shown) == (True, True)
    new = run("keys", "rotate", made["id"], "--keep-old-minutes", "5", "--days", "30").output.strip()
    assert json.loads(run("keys", "show", new.split("_")[1], "--json").output)["expires_at"] is not None
    assert run("keys", "delete", new.split("_")[1]).exit_code == 0
    for word in ("disable", "enable", "delete"):
        assert run("tenants", word, "lab").exit_code == 0
    audit = json.loads(run("tenants", "audit", "--json").output)
    assert (audit[0]["action"], audit[-1]["action"], "@" in audit[0]["actor"]) == (
        "tenant.delete",
        "tenant.create",
        True,
    )
    assert "key.rotate" in run("tenants", "audit").output
    assert new not in json.dumps(audit)


@pytest.mark.parametrize(
    ("arguments", "exit_code", "remedy"),
    [
        (("tenants", "show", "nobody"), 1, "celeriac tenants create nobody"),
        (("tenants", "create", "a b"), 1, "1 to 64 letters"),
        (("tenants", "limit", "default"), 2, "--requests-per-minute 60"),
        (("tenants", "limit", "default", "--streams", "many"), 2, f"a whole number from 1 to {2**53}, or none"),
        (("tenants", "limit", "default", "--streams", "0"), 2, f"a whole number from 1 to {2**53}, or none"),
        (("tenants", "limit", "default", "--streams", "0" * 16 + "1" * 16), 2, "a whole number from 1"),
        (("tenants", "limit", "default", "--queued-jobs", str(2**31)), 2, f"a whole number from 1 to {2**31 - 1}"),
        (("tenants", "limit", "default", "--weight", "1e-300"), 2, "0.001"),
        (("tenants", "limit", "default", "--weight", "nan"), 1, "weight is nan; give a number from 0.001 to 1000"),
        (("tenants", "delete", "default"), 1, "disable its keys instead"),
        (("keys", "disable", "nobody"), 1, "celeriac keys list --all"),
        (("keys", "create", "--scope", "root"), 2, "submit"),
        (("keys", "show", "sk_Ab3dE6gH_secret"), 1, "the part after its first underscore; give 'Ab3dE6gH' alone"),
    ],
)
def test_a_wrong_command_says_what_to_do(
    run: Callable[..., Any], arguments: tuple[str, ...], exit_code: int, remedy: str
) -> None:
    result = run(*arguments)
    assert (result.exit_code, remedy in " ".join(result.output.split())) == (exit_code, True), result.output
    assert "secret" not in result.output
