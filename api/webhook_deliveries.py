"""The log of webhook deliveries: what was sent where, how every attempt went, and once more on request."""

from uuid import UUID

import orjson
from fastapi import Request
from starlette.responses import Response

from api.deps import caller_of, private_router
from api.queries import query_parameters, read_query
from api.services import Services
from api.views import page
from api.webhook_endpoints import cursor
from api.webhook_schemas import DeliveriesQuery, DeliveryListView, DeliveryView, attempt_view, delivery_view
from domain.errors import InvalidRequest, NotFound
from domain.ids import parse_id, parse_id_of_other
from storage import webhook_deliveries

router = private_router()


@router.get(
    "/v1/webhook_deliveries",
    responses={200: {"model": DeliveryListView}},
    openapi_extra={"parameters": query_parameters(DeliveriesQuery)},
)
async def list_deliveries(request: Request) -> Response:
    """Newest first, without their attempts; those that are done are kept for a week."""
    services, tenant_id = caller_of(request)
    query = read_query(request, DeliveriesQuery)
    found = await services.read(
        webhook_deliveries.list_deliveries,
        tenant_id,
        job_id=_job_id(query.job_id),
        endpoint_id=_endpoint_id(query.webhook_endpoint_id),
        status=query.delivery_status,
        after=cursor(query.after, "whd"),
        limit=query.limit + 1,
    )
    shown = page([delivery_view(delivery) for delivery in found], query.limit)
    return Response(orjson.dumps(shown), media_type="application/json")


@router.get("/v1/webhook_deliveries/{delivery_id}", responses={200: {"model": DeliveryView}})
async def read_delivery(delivery_id: str, request: Request) -> Response:
    """With every attempt."""
    services, tenant_id = caller_of(request)
    return await _view(services, _parse(delivery_id), tenant_id, delivery_id)


@router.post("/v1/webhook_deliveries/{delivery_id}/redeliver", responses={200: {"model": DeliveryView}})
async def redeliver(delivery_id: str, request: Request) -> Response:
    """Send it once more, at once and with a new 72 hours of retries; its id and its event stay the same."""
    services, tenant_id = caller_of(request)
    id_ = _parse(delivery_id)
    if not await services.write(webhook_deliveries.redeliver, id_, tenant_id):
        raise _not_found(delivery_id)
    return await _view(services, id_, tenant_id, delivery_id)


async def _view(services: Services, id_: UUID, tenant_id: UUID, delivery_id: str) -> Response:
    found = await services.read(webhook_deliveries.get, id_, tenant_id)
    if found is None:
        raise _not_found(delivery_id)
    delivery, attempts = found
    view = delivery_view(delivery) | {"attempts": [attempt_view(attempt) for attempt in attempts]}
    return Response(orjson.dumps(view), media_type="application/json")


def _job_id(text: str | None) -> UUID | None:
    try:
        return None if text is None else parse_id(text)
    except ValueError as exc:
        raise InvalidRequest(f"job_id: {exc}", param="job_id") from None


def _endpoint_id(text: str | None) -> UUID | None:
    try:
        return None if text is None else parse_id_of_other(text, "wh")
    except ValueError as exc:
        raise InvalidRequest(f"webhook_endpoint_id: {exc}", param="webhook_endpoint_id") from None


def _parse(delivery_id: str) -> UUID:
    try:
        return parse_id_of_other(delivery_id, "whd")
    except ValueError:
        raise _not_found(delivery_id) from None


def _not_found(delivery_id: str) -> NotFound:
    return NotFound(f"there is no webhook delivery {delivery_id[:64]!r}; check the id", param="delivery_id")
