"""What the key of a request may do, and how much of it is left, so that a client need not ask for what is refused."""

from uuid import UUID

from fastapi import APIRouter
from sqlalchemy.exc import NoResultFound
from sqlalchemy.orm import Session
from starlette.requests import Request
from starlette.responses import Response

from api.errors import json_response
from api.openapi import REFUSALS
from api.services import AnyKeyRoute, caller_of
from dialects.administration import OwnKeyView, OwnLimitsView, own_limits_view
from domain.errors import AuthenticationFailed
from storage.limits_left import left_to_key, left_to_tenant
from storage.tables import Tenant

router = APIRouter(route_class=AnyKeyRoute, responses=REFUSALS, tags=["Operations"])


@router.get("/v1/key", responses={200: {"model": OwnKeyView}})
async def read_own_key(request: Request) -> Response:
    """The key that the request was sent with, and the scopes of the routes that it opens."""
    scopes = sorted(request.state.scopes)
    return json_response({"object": "api_key", "id": request.state.key_id, "scopes": scopes})


@router.get("/v1/limits", responses={200: {"model": OwnLimitsView}})
async def read_own_limits(request: Request) -> Response:
    """The limits of the key that the request was sent with and of its tenant, and what is left of each. A job needs
    room in both."""
    services, tenant_id = caller_of(request)
    return json_response(await services.read(_own_limits, tenant_id, request.state.key_id))


def _own_limits(session: Session, tenant_id: UUID, key_id: str | None) -> OwnLimitsView:
    of_key = None if key_id is None else left_to_key(session, tenant_id, key_id)
    try:
        of_tenant = left_to_tenant(session, session.get_one(Tenant, tenant_id))
    except NoResultFound:  # keys are remembered for a few seconds
        raise AuthenticationFailed("this tenant was deleted a moment ago; use the key of another one") from None
    return own_limits_view(of_key, of_tenant)
