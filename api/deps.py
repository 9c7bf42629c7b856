"""What every route stands on: the process's services, and the tenant whose key came with the request."""

from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple
from uuid import UUID

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute

from api.services import Services


class Caller(NamedTuple):
    services: Services
    tenant_id: UUID


def private_router() -> APIRouter:
    """Where every route belongs but health: none of its routes answers without a key, whatever their functions do."""
    return APIRouter(route_class=PrivateRoute)


class PrivateRoute(APIRoute):
    """Authenticates before anything else is looked at. Not a FastAPI dependency: solving those would cost more than
    all the rest of the way in."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        answer = super().get_route_handler()

        async def answer_authenticated(request: Request) -> Response:
            authorization = request.headers.get("authorization")
            request.state.tenant_id = await services_of(request).authenticator.tenant_of(authorization)
            return await answer(request)

        return answer_authenticated


def caller_of(request: Request) -> Caller:
    """On a private route: the services, and who asks."""
    return Caller(services_of(request), request.state.tenant_id)


def services_of(request: Request) -> Services:
    services = request.app.state.services
    assert isinstance(services, Services)
    return services
