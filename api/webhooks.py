"""/v1/webhook_endpoints, /v1/webhook_secret and /v1/webhook_deliveries: manage endpoints, secrets and deliveries.

Endpoints are those of the OpenAI SDK 3.x. The tenant's secret signs deliveries to the URLs of single jobs. The delivery
log has every attempt, and can deliver an event again.
"""

import time
from uuid import UUID

from starlette.requests import Request
from starlette.responses import Response

from api.errors import json_response
from api.inputs import PageQuery, list_page, listing, off_loop, read_body, read_model, read_query
from api.openapi import request_body
from api.services import Services, caller_of, private_router
from api.webhook_schemas import (
    CreateBody,
    DeliveriesQuery,
    DeliveryListView,
    DeliveryView,
    EndpointListView,
    EndpointTestView,
    EndpointView,
    EndpointWithSecretView,
    EventTypeListView,
    RotateBody,
    SecretView,
    TestBody,
    UpdateBody,
    attempt_view,
    delivery_view,
    endpoint_view,
    secret_view,
)
from dialects.bodies import parse_model
from dialects.openai_views import DeletedView
from domain.errors import InvalidRequest, NotFound
from domain.jobs import external_id, new_id, parse_id, parse_id_of_other
from domain.webhooks import EVENT_TYPES, BadWebhookUrl, payload, signature_headers
from storage import webhook_deliveries, webhooks
from storage.webhooks import WebhookEndpoint
from tasks.webhook_http import TargetGuard, WebhookClient

router = private_router("Webhooks")


@router.get("/v1/webhook_event_types", responses={200: {"model": EventTypeListView}})
async def list_event_types(request: Request) -> Response:
    """The event types that an endpoint can subscribe to."""
    return json_response({"object": "list", "data": list(EVENT_TYPES)})


@router.post(
    "/v1/webhook_endpoints",
    responses={200: {"model": EndpointWithSecretView}},
    openapi_extra=request_body(CreateBody),
)
async def create_endpoint(request: Request) -> Response:
    """Create an endpoint. Only this answer contains its signing secret."""
    services, tenant_id = caller_of(request)
    body = await read_model(request, CreateBody)
    endpoint = await services.write(
        webhooks.create_endpoint,
        tenant_id,
        name=body.name,
        url=await checked_url(services, body.url),
        event_types=body.event_types,
    )
    if endpoint is None:
        raise InvalidRequest(
            f"there are {webhooks.MAX_ENDPOINTS} webhook endpoints, the most a tenant may have; delete one first"
        )
    return json_response(endpoint_view(endpoint) | {"signing_secret": endpoint.secret})


@router.get("/v1/webhook_endpoints", **listing(EndpointListView, PageQuery))
async def list_endpoints(request: Request) -> Response:
    """The tenant's endpoints, newest first."""
    query = read_query(request, PageQuery)
    return await list_page(request, query, webhooks.list_endpoints, endpoint_view, prefix="wh")


@router.get("/v1/webhook_endpoints/{webhook_endpoint_id}", responses={200: {"model": EndpointView}})
async def read_endpoint(webhook_endpoint_id: str, request: Request) -> Response:
    services, tenant_id = caller_of(request)
    return json_response(endpoint_view(await _find(services, webhook_endpoint_id, tenant_id)))


@router.post(
    "/v1/webhook_endpoints/{webhook_endpoint_id}",
    responses={200: {"model": EndpointView}},
    openapi_extra=request_body(UpdateBody),
)
async def update_endpoint(webhook_endpoint_id: str, request: Request) -> Response:
    """Change the fields that are given. Pending deliveries go to the new URL."""
    services, tenant_id = caller_of(request)
    body = await read_model(request, UpdateBody)
    id_ = _parse(webhook_endpoint_id)
    changed = await services.write(
        webhooks.change_endpoint,
        id_,
        tenant_id,
        name=body.name,
        url=None if body.url is None else await checked_url(services, body.url),
        event_types=body.event_types,
        enabled=body.enabled,
    )
    return json_response(endpoint_view(_found(changed, webhook_endpoint_id)))


@router.delete("/v1/webhook_endpoints/{webhook_endpoint_id}", responses={200: {"model": DeletedView}})
async def delete_endpoint(webhook_endpoint_id: str, request: Request) -> Response:
    """Delete the endpoint with its deliveries and their log."""
    services, tenant_id = caller_of(request)
    id_ = _parse(webhook_endpoint_id)
    if not await services.write(webhooks.remove_endpoint, id_, tenant_id):
        raise _not_found(webhook_endpoint_id)
    return json_response({"id": external_id(id_, "wh"), "object": "webhook_endpoint.deleted", "deleted": True})


@router.post(
    "/v1/webhook_endpoints/{webhook_endpoint_id}/rotate_secret",
    responses={200: {"model": EndpointWithSecretView}},
    openapi_extra=request_body(RotateBody, is_required=False),
)
async def rotate_secret(webhook_endpoint_id: str, request: Request) -> Response:
    """Create a new secret, which the answer contains. The old one stops working at once, unless the body keeps it for
    24 hours."""
    services, tenant_id = caller_of(request)
    keep = (await _read_rotation(request)).keep_old_secret_active_for_24_hours
    id_ = _parse(webhook_endpoint_id)
    rotated = await services.write(webhooks.rotate_secret, id_, tenant_id, with_overlap=keep)
    endpoint = _found(rotated, webhook_endpoint_id)
    return json_response(endpoint_view(endpoint) | {"signing_secret": endpoint.secret})


@router.post(
    "/v1/webhook_endpoints/{webhook_endpoint_id}/test",
    responses={200: {"model": EndpointTestView}},
    openapi_extra=request_body(TestBody),
)
async def test_endpoint(webhook_endpoint_id: str, request: Request) -> Response:
    """Send a sample event once, now. Returns the status code of the answer, whatever it is; 400 if there was no
    answer."""
    services, tenant_id = caller_of(request)
    body = await read_model(request, TestBody)
    endpoint = await _find(services, webhook_endpoint_id, tenant_id)
    status_code = await _send_sample(TargetGuard(services.settings), endpoint, body.event_type)
    return json_response(
        {
            "object": "webhook_endpoint.test",
            "webhook_endpoint_id": external_id(endpoint.id, "wh"),
            "event_type": body.event_type,
            "status_code": status_code,
            "success": True,
        }
    )


@router.get("/v1/webhook_secret", responses={200: {"model": SecretView}})
async def read_secret(request: Request) -> Response:
    """The secret that signs deliveries to the URLs of single jobs."""
    services, tenant_id = caller_of(request)
    return json_response(secret_view(await services.write(webhooks.tenant_secret, tenant_id)))


@router.post(
    "/v1/webhook_secret/rotate_secret",
    responses={200: {"model": SecretView}},
    openapi_extra=request_body(RotateBody, is_required=False),
)
async def rotate_tenant_secret(request: Request) -> Response:
    services, tenant_id = caller_of(request)
    keep = (await _read_rotation(request)).keep_old_secret_active_for_24_hours
    secret = await services.write(webhooks.rotate_tenant_secret, tenant_id, with_overlap=keep)
    return json_response(secret_view(secret))


async def checked_url(services: Services, text: str) -> str:
    """The URL in the form that is stored. Raises InvalidRequest if deliveries to it are not allowed."""
    try:
        return str(await TargetGuard(services.settings).check(text))
    except BadWebhookUrl as exc:
        raise InvalidRequest(f"url: {exc}", param="url") from None


async def _send_sample(guard: TargetGuard, endpoint: WebhookEndpoint, event_type: str) -> int:
    event_id, now = new_id(), int(time.time())
    body = payload(event_id, event_type, endpoint.updated_at.fromtimestamp(now, endpoint.updated_at.tzinfo))
    client = WebhookClient(guard)
    try:
        url = guard.parse(endpoint.url)
        answer = await client.post(url, signature_headers(event_id, body, [endpoint.secret], now), body)
    except BadWebhookUrl as exc:
        raise InvalidRequest(f"the endpoint's URL is not allowed: {exc}") from None
    finally:
        await client.aclose()
    if answer.status_code is None:
        raise InvalidRequest(f"the endpoint did not answer: {answer.error}; check its URL")
    return answer.status_code


async def _read_rotation(request: Request) -> RotateBody:
    """The body, which the SDK leaves out if all fields have their defaults."""
    raw = await read_body(request)
    return await off_loop(request, parse_model, raw, RotateBody) if raw.strip() else RotateBody()


async def _find(services: Services, endpoint_id: str, tenant_id: UUID) -> WebhookEndpoint:
    found = await services.read(webhooks.get_endpoint, _parse(endpoint_id), tenant_id)
    return _found(found, endpoint_id)


def _found(endpoint: WebhookEndpoint | None, endpoint_id: str) -> WebhookEndpoint:
    if endpoint is None:
        raise _not_found(endpoint_id)
    return endpoint


def _parse(endpoint_id: str) -> UUID:
    try:
        return parse_id_of_other(endpoint_id, "wh")
    except ValueError:
        raise _not_found(endpoint_id) from None


def _not_found(endpoint_id: str) -> NotFound:
    return NotFound(f"there is no webhook endpoint {endpoint_id[:64]!r}; check the id", param="webhook_endpoint_id")


@router.get("/v1/webhook_deliveries", **listing(DeliveryListView, DeliveriesQuery))
async def list_deliveries(request: Request) -> Response:
    """Deliveries, newest first, without their attempts. Finished ones are kept for a week."""
    query = read_query(request, DeliveriesQuery)
    return await list_page(
        request,
        query,
        webhook_deliveries.list_deliveries,
        delivery_view,
        prefix="whd",
        job_id=_job_id(query.job_id),
        endpoint_id=_endpoint_id(query.webhook_endpoint_id),
        status=query.delivery_status,
    )


@router.get("/v1/webhook_deliveries/{delivery_id}", responses={200: {"model": DeliveryView}})
async def read_delivery(delivery_id: str, request: Request) -> Response:
    """One delivery with all its attempts."""
    services, tenant_id = caller_of(request)
    return await _view(services, _parse_delivery_id(delivery_id), tenant_id, delivery_id)


@router.post("/v1/webhook_deliveries/{delivery_id}/redeliver", responses={200: {"model": DeliveryView}})
async def redeliver(delivery_id: str, request: Request) -> Response:
    """Deliver the event again: at once, and with another 72 hours of retries. Its id and content stay the same."""
    services, tenant_id = caller_of(request)
    id_ = _parse_delivery_id(delivery_id)
    if not await services.write(webhook_deliveries.redeliver, id_, tenant_id):
        raise _delivery_not_found(delivery_id)
    return await _view(services, id_, tenant_id, delivery_id)


async def _view(services: Services, id_: UUID, tenant_id: UUID, delivery_id: str) -> Response:
    found = await services.read(webhook_deliveries.get, id_, tenant_id)
    if found is None:
        raise _delivery_not_found(delivery_id)
    delivery, attempts = found
    view = delivery_view(delivery) | {"attempts": [attempt_view(attempt) for attempt in attempts]}
    return json_response(view)


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


def _parse_delivery_id(delivery_id: str) -> UUID:
    try:
        return parse_id_of_other(delivery_id, "whd")
    except ValueError:
        raise _delivery_not_found(delivery_id) from None


def _delivery_not_found(delivery_id: str) -> NotFound:
    return NotFound(f"there is no webhook delivery {delivery_id[:64]!r}; check the id", param="delivery_id")
