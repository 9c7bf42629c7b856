"""/v1/admin/tenants, /v1/admin/keys and /v1/admin/audit: who may use the installation, how much, and who decided it."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from pydantic import Field
from sqlalchemy.orm import Session
from starlette.requests import Request
from starlette.responses import Response

from api.errors import json_response
from api.inputs import PageQuery, listing, off_loop, read_body, read_model, read_query, require_json
from api.openapi import request_body
from api.services import private_router, services_of
from dialects.administration import (
    ApiKeyListView,
    ApiKeyView,
    AuditEntryListView,
    KeyBody,
    KeyChangesBody,
    KeyRotationBody,
    TenantAdminListView,
    TenantAdminView,
    TenantBody,
    TenantChangesBody,
    api_key_view,
    audit_entry_view,
    left_view,
    tenant_admin_view,
)
from dialects.bodies import parse_model
from dialects.openai_views import DeletedView, page
from storage import administration, limits
from storage.administration import NewKey
from storage.limits_left import left_to_key, left_to_tenant
from storage.tables import ApiKey, Tenant

router = private_router("Operations")

NOT_STORED = {"cache-control": "no-store"}


class KeysQuery(PageQuery):
    tenant: str | None = Field(default=None, description="Only keys of this tenant.")


@router.get("/v1/admin/tenants", **listing(TenantAdminListView, PageQuery))
async def list_tenants(request: Request) -> Response:
    """All tenants by name, with their limits."""
    query = read_query(request, PageQuery)
    return json_response(page(await services_of(request).system_read(_list_tenants, query), query.limit))


@router.post("/v1/admin/tenants", responses={200: {"model": TenantAdminView}}, openapi_extra=request_body(TenantBody))
async def create_tenant(request: Request) -> Response:
    body = await read_model(request, TenantBody)
    return json_response(await services_of(request).system_write(_create_tenant, body, actor_of(request)))


@router.get("/v1/admin/tenants/{tenant}", responses={200: {"model": TenantAdminView}})
async def read_tenant(tenant: str, request: Request) -> Response:
    return json_response(await services_of(request).system_read(_read_tenant, tenant))


@router.post(
    "/v1/admin/tenants/{tenant}",
    responses={200: {"model": TenantAdminView}},
    openapi_extra=request_body(TenantChangesBody),
)
async def change_tenant(tenant: str, request: Request) -> Response:
    """Change, limit, disable or enable it. Every API process follows within five seconds."""
    body = await read_model(request, TenantChangesBody)
    return json_response(await services_of(request).system_write(_change_tenant, tenant, body, actor_of(request)))


@router.delete("/v1/admin/tenants/{tenant}", responses={200: {"model": DeletedView}})
async def delete_tenant(tenant: str, request: Request) -> Response:
    """Delete it with its keys, files and webhooks; refused while it has jobs."""
    await services_of(request).system_write(administration.delete_tenant, tenant, actor=actor_of(request))
    return json_response({"id": tenant, "object": "tenant", "deleted": True})


@router.get("/v1/admin/keys", **listing(ApiKeyListView, KeysQuery))
async def list_keys(request: Request) -> Response:
    """The keys of all tenants or of one, newest first. A key itself cannot be read again."""
    query = read_query(request, KeysQuery)
    return json_response(page(await services_of(request).system_read(_list_keys, query), query.limit))


@router.post("/v1/admin/keys", responses={200: {"model": ApiKeyView}}, openapi_extra=request_body(KeyBody))
async def create_key(request: Request) -> Response:
    """Only this answer contains the key."""
    body = await read_model(request, KeyBody)
    answer = await services_of(request).system_write(_create_key, body, actor_of(request))
    return json_response(answer, headers=NOT_STORED)


@router.get("/v1/admin/keys/{key_id}", responses={200: {"model": ApiKeyView}})
async def read_key(key_id: str, request: Request) -> Response:
    """`key_id` is the middle part of a key: sk_<id>_..."""
    return json_response(await services_of(request).system_read(_read_key, key_id))


@router.post(
    "/v1/admin/keys/{key_id}",
    responses={200: {"model": ApiKeyView}},
    openapi_extra=request_body(KeyChangesBody),
)
async def change_key(key_id: str, request: Request) -> Response:
    """Limit, disable or enable it. Every API process follows within five seconds, and so do open streams."""
    body = await read_model(request, KeyChangesBody)
    return json_response(await services_of(request).system_write(_change_key, key_id, body, actor_of(request)))


@router.post(
    "/v1/admin/keys/{key_id}/rotate",
    responses={200: {"model": ApiKeyView}},
    openapi_extra=request_body(KeyRotationBody, is_required=False),
)
async def rotate_key(key_id: str, request: Request) -> Response:
    """Create a key to take this one's place, with its name, scopes and limits, and its expiry unless the body has
    another. Only this answer contains it. The old one stops working at once, unless the body keeps it for a while."""
    raw = await read_body(request)
    if raw:
        require_json(request)
    body = await off_loop(request, parse_model, raw or b"{}", KeyRotationBody)
    answer = await services_of(request).system_write(_rotate_key, key_id, body, actor_of(request))
    return json_response(answer, headers=NOT_STORED)


@router.delete("/v1/admin/keys/{key_id}", responses={200: {"model": DeletedView}})
async def delete_key(key_id: str, request: Request) -> Response:
    """Its jobs stay."""
    await services_of(request).system_write(administration.delete_key, key_id, actor=actor_of(request))
    return json_response({"id": key_id, "object": "api_key", "deleted": True})


@router.get("/v1/admin/audit", **listing(AuditEntryListView, PageQuery))
async def list_audit(request: Request) -> Response:
    """What administrators have changed, newest first."""
    query = read_query(request, PageQuery)
    after = query.cursor("audit")
    found = await services_of(request).system_read(administration.list_audit, after=after, limit=query.limit + 1)
    return json_response(page([audit_entry_view(entry) for entry in found], query.limit))


def actor_of(request: Request) -> str:
    key_id: str | None = request.state.key_id
    return "no key" if key_id is None else f"key {key_id}"


def _list_tenants(session: Session, query: PageQuery) -> list[TenantAdminView]:
    return _tenant_views(session, administration.list_tenants(session, after=query.after, limit=query.limit + 1))


def _create_tenant(session: Session, body: TenantBody, actor: str) -> TenantAdminView:
    return _tenant_view(session, administration.create_tenant(session, body.name, body.to_changes(), actor=actor))


def _read_tenant(session: Session, name: str) -> TenantAdminView:
    tenant = administration.find_tenant(session, name)
    own, left = left_to_tenant(session, tenant)
    return {**tenant_admin_view(tenant, own), "left": left_view(left)}


def _change_tenant(session: Session, name: str, body: TenantChangesBody, actor: str) -> TenantAdminView:
    return _tenant_view(session, administration.change_tenant(session, name, body.to_changes(), actor=actor))


def _tenant_view(session: Session, tenant: Tenant) -> TenantAdminView:
    return _tenant_views(session, [tenant])[0]


def _tenant_views(session: Session, tenants: Sequence[Tenant]) -> list[TenantAdminView]:
    found = limits.limits_of_tenants(session, tenants)
    return [tenant_admin_view(tenant, found[tenant.id]) for tenant in tenants]


def _list_keys(session: Session, query: KeysQuery) -> list[ApiKeyView]:
    tenant_id = None if query.tenant is None else administration.find_tenant(session, query.tenant).id
    keys = administration.list_keys(session, tenant_id=tenant_id, after=query.after, limit=query.limit + 1)
    return _key_views(session, keys)


def _create_key(session: Session, body: KeyBody, actor: str) -> ApiKeyView:
    new = administration.create_key(
        session,
        administration.find_tenant(session, body.tenant),
        name=body.name,
        expires_at=_after(body.expires_in_seconds),
        scopes=body.scopes,
        max_priority=body.max_priority,
        key_limits=body.limits,
        actor=actor,
    )
    return _new_key_view(session, new)


def _read_key(session: Session, key_id: str) -> ApiKeyView:
    key = administration.find_key(session, key_id)
    _, left = left_to_key(session, key.tenant_id, key.id)
    return {**_key_view(session, key), "left": left_view(left)}


def _change_key(session: Session, key_id: str, body: KeyChangesBody, actor: str) -> ApiKeyView:
    return _key_view(session, administration.change_key(session, key_id, body.to_changes(), actor=actor))


def _rotate_key(session: Session, key_id: str, body: KeyRotationBody, actor: str) -> ApiKeyView:
    until, ends = _after(body.keep_old_seconds), _after(body.expires_in_seconds)
    new = administration.rotate_key(session, key_id, keep_old_until=until, expires_at=ends, actor=actor)
    return _new_key_view(session, new)


def _after(seconds: int | None) -> datetime | None:
    return datetime.now(UTC) + timedelta(seconds=seconds) if seconds else None


def _new_key_view(session: Session, new: NewKey) -> ApiKeyView:
    return _key_view(session, new.row) | {"key": new.text}


def _key_view(session: Session, key: ApiKey) -> ApiKeyView:
    return _key_views(session, [key])[0]


def _key_views(session: Session, keys: Sequence[ApiKey]) -> list[ApiKeyView]:
    names = administration.names_of_tenants(session, [key.tenant_id for key in keys])
    found = limits.limits_of_keys(session, [key.id for key in keys])
    return [api_key_view(key, names[key.tenant_id], found[key.id]) for key in keys]
