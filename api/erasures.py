"""/v1/admin/tenants/{tenant}/erasures: erase one user of a tenant; maintenance does it (maintenance/erasing.py)."""

from sqlalchemy.orm import Session
from starlette.requests import Request
from starlette.responses import Response

from api.admin_keys import actor_of
from api.errors import json_response
from api.inputs import PageQuery, listing, read_model, read_query
from api.openapi import request_body
from api.services import private_router, services_of
from dialects.erasures import ErasureBody, ErasureListView, ErasureView, erasure_view
from dialects.openai_views import page
from storage import administration, erasures

router = private_router("Operations")


@router.post(
    "/v1/admin/tenants/{tenant}/erasures",
    status_code=202,
    responses={202: {"model": ErasureView}},
    openapi_extra=request_body(ErasureBody),
)
async def erase_user(tenant: str, request: Request) -> Response:
    """Erase all that one user of the tenant has asked for and got, in the background. It survives restarts of every
    process. While it is under way, asking again returns the same one; afterwards, it erases what has come since."""
    body = await read_model(request, ErasureBody)
    view = await services_of(request).system_write(_ask, tenant, body, actor_of(request))
    return json_response(view, 202)


@router.get("/v1/admin/tenants/{tenant}/erasures", **listing(ErasureListView, PageQuery))
async def list_erasures(tenant: str, request: Request) -> Response:
    """The tenant's erasures, newest first."""
    query = read_query(request, PageQuery)
    query.cursor("erasure")
    return json_response(page(await services_of(request).system_read(_list, tenant, query), query.limit))


@router.get("/v1/admin/tenants/{tenant}/erasures/{erasure_id}", responses={200: {"model": ErasureView}})
async def read_erasure(tenant: str, erasure_id: str, request: Request) -> Response:
    """How far it has come."""
    return json_response(await services_of(request).system_read(_read, tenant, erasure_id))


def _ask(session: Session, tenant: str, body: ErasureBody, actor: str) -> ErasureView:
    return erasure_view(erasures.ask(session, administration.find_tenant(session, tenant), body.person, actor=actor))


def _list(session: Session, tenant: str, query: PageQuery) -> list[ErasureView]:
    own = administration.find_tenant(session, tenant)
    found = erasures.list_of(session, own, after=query.cursor("erasure"), limit=query.limit + 1)
    return [erasure_view(erasure) for erasure in found]


def _read(session: Session, tenant: str, erasure_id: str) -> ErasureView:
    return erasure_view(erasures.find(session, administration.find_tenant(session, tenant), erasure_id))
