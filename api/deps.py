"""What routes ask for: the process's services, and the tenant whose key came with the request."""

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Depends, Request

from api.services import Services


async def get_services(request: Request) -> Services:
    # Not a plain function: FastAPI would call that in a thread.
    return services_of(request)


def services_of(request: Request) -> Services:
    services = request.app.state.services
    assert isinstance(services, Services)
    return services


async def get_tenant_id(request: Request) -> UUID:
    """Raises AuthenticationFailed."""
    return await services_of(request).authenticator.tenant_of(request.headers.get("authorization"))


ServicesDep = Annotated[Services, Depends(get_services)]
TenantId = Annotated[UUID, Depends(get_tenant_id)]


def private_router() -> APIRouter:
    """Where every route belongs but health: no answer without a key, whether the route asks for the tenant or not."""
    return APIRouter(dependencies=[Depends(get_tenant_id)])
