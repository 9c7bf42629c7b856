"""What every route stands on: the process's services, and the tenant whose key came with the request."""

import time
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, NamedTuple
from uuid import UUID

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute

from api.auth import REMEMBER_SECONDS
from api.openapi import NEEDS_KEY, REFUSALS
from api.services import Services
from domain.errors import PermissionDenied


class Caller(NamedTuple):
    services: Services
    tenant_id: UUID


def private_router() -> APIRouter:
    """Where every route belongs but health: none of its routes answers without a key, whatever their functions do."""
    return APIRouter(route_class=PrivateRoute, responses=REFUSALS)


class PrivateRoute(APIRoute):
    """Authenticates before anything else is looked at. Not a FastAPI dependency: solving those would cost more than
    all the rest of the way in."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        options["openapi_extra"] = NEEDS_KEY | (options.get("openapi_extra") or {})
        super().__init__(path, endpoint, **options)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        answer = super().get_route_handler()

        async def answer_authenticated(request: Request) -> Response:
            authorization = request.headers.get("authorization")
            authenticator = services_of(request).authenticator
            request.state.tenant_id, request.state.is_admin = await authenticator.identify(authorization)
            request.state.until_revoked = partial(authenticator.wait_until_revoked, authorization)
            started = time.monotonic()
            response = await answer(request)
            if request.method == "GET" and time.monotonic() - started > REMEMBER_SECONDS:
                await authenticator.identify(authorization)  # a long poll tells nothing to a key revoked meanwhile
            return response

        return answer_authenticated


def caller_of(request: Request) -> Caller:
    """On a private route: the services, and who asks."""
    return Caller(services_of(request), request.state.tenant_id)


def require_admin(request: Request) -> None:
    """On a private route. Raises PermissionDenied."""
    if not request.state.is_admin:
        raise PermissionDenied("this key may not do that; use one made with: celeriac keys create --admin")


def services_of(request: Request) -> Services:
    services = request.app.state.services
    assert isinstance(services, Services)
    return services
