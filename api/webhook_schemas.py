"""Request and response schemas of the webhook routes; endpoints have the fields of the OpenAI SDK 3.x."""

from typing import Annotated, Literal, NotRequired

from pydantic import ConfigDict, Field, StringConstraints

from api.inputs import PageQuery
from dialects.native import NO_NUL, WebhookUrlText
from dialects.openai_views import PageView, Timestamp, View, optional_timestamp, timestamp
from domain.jobs import FirstErrorModel, external_id
from domain.webhooks import EVENT_TYPES, PREFIX_BY_OBJECT, DeliveryStatus, secret_hint
from storage.webhooks import WebhookAttempt, WebhookDelivery, WebhookEndpoint, WebhookSecret

Name = Annotated[str, StringConstraints(min_length=1, max_length=256, pattern=NO_NUL)]
EventType = Annotated[str, StringConstraints(max_length=64, pattern="^(" + "|".join(EVENT_TYPES) + ")$")]
EventTypes = Annotated[list[EventType], Field(min_length=1, max_length=len(EVENT_TYPES))]


class WebhookBody(FirstErrorModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class CreateBody(WebhookBody):
    """POST /v1/webhook_endpoints."""

    name: Name
    url: WebhookUrlText
    event_types: EventTypes


class UpdateBody(WebhookBody):
    """POST /v1/webhook_endpoints/{id}: the fields that are given are changed."""

    name: Name | None = None
    url: WebhookUrlText | None = None
    event_types: EventTypes | None = None
    enabled: bool | None = Field(default=None, description="false: nothing more is sent, and pending deliveries fail.")


class RotateBody(WebhookBody):
    """POST .../rotate_secret, for an endpoint or for the tenant."""

    keep_old_secret_active_for_24_hours: bool = False


class TestBody(WebhookBody):
    """POST /v1/webhook_endpoints/{id}/test."""

    event_type: EventType


class DeliveriesQuery(PageQuery):
    job_id: str | None = Field(default=None, description="Only deliveries about this job.")
    webhook_endpoint_id: str | None = Field(default=None, description="Only deliveries to this endpoint.")
    status: Literal["pending", "delivered", "failed"] | None = None

    @property
    def delivery_status(self) -> DeliveryStatus | None:
        return None if self.status is None else DeliveryStatus(self.status)


class EventTypeListView(View):
    object: Literal["list"]
    data: list[str]


class EndpointView(View):
    id: str
    object: Literal["webhook_endpoint"]
    created_at: int
    updated_at: int
    name: str
    url: str
    event_types: list[str]
    enabled: bool
    signing_secret_hint: str


class EndpointWithSecretView(EndpointView):
    signing_secret: Annotated[str, Field(description="Shown only in this answer.")]


class EndpointTestView(View):
    object: Literal["webhook_endpoint.test"]
    webhook_endpoint_id: str
    event_type: str
    status_code: int
    success: bool


class EndpointListView(PageView):
    data: list[EndpointView]


class SecretView(View):
    object: Literal["webhook_secret"]
    signing_secret: str
    updated_at: int
    previous_secret_expires_at: Timestamp | None


class DeliveryAttemptView(View):
    number: int
    attempted_at: Timestamp
    seconds: float
    status_code: int | None
    error: str | None


class DeliveryView(View):
    id: str
    object: Literal["webhook_delivery"]
    event_id: str
    event_type: str
    about: Annotated[str, Field(description="The id of the job or other object that the event is about.")]
    webhook_endpoint_id: str | None
    url: str
    status: DeliveryStatus
    num_attempts: int
    last_status_code: int | None
    last_error: str | None
    created_at: Timestamp
    delivered_at: Timestamp | None
    next_attempt_at: Timestamp | None
    attempts: NotRequired[
        Annotated[list[DeliveryAttemptView] | None, Field(description="Only when a single delivery is read.")]
    ]


class DeliveryListView(PageView):
    data: list[DeliveryView]


def endpoint_view(endpoint: WebhookEndpoint) -> EndpointView:
    return {
        "id": external_id(endpoint.id, "wh"),
        "object": "webhook_endpoint",
        "created_at": int(endpoint.created_at.timestamp()),
        "updated_at": int(endpoint.updated_at.timestamp()),
        "name": endpoint.name,
        "url": endpoint.url,
        "event_types": endpoint.event_types,
        "enabled": endpoint.disabled_at is None,
        "signing_secret_hint": secret_hint(endpoint.secret),
    }


def secret_view(secret: WebhookSecret) -> SecretView:
    return {
        "object": "webhook_secret",
        "signing_secret": secret.secret,
        "updated_at": int(secret.updated_at.timestamp()),
        "previous_secret_expires_at": optional_timestamp(secret.previous_secret_expires_at),
    }


def delivery_view(delivery: WebhookDelivery) -> DeliveryView:
    """Without `attempts`, which the route for a single delivery adds."""
    prefix = PREFIX_BY_OBJECT[delivery.type.partition(".")[0]]
    return {
        "id": external_id(delivery.id, "whd"),
        "object": "webhook_delivery",
        "event_id": external_id(delivery.event_id, "evt"),
        "event_type": delivery.type,
        "about": external_id(delivery.event_id, prefix),
        "webhook_endpoint_id": None if delivery.endpoint_id is None else external_id(delivery.endpoint_id, "wh"),
        "url": delivery.url,
        "status": delivery.status,
        "num_attempts": delivery.num_attempts,
        "last_status_code": delivery.last_status_code,
        "last_error": delivery.last_error,
        "created_at": timestamp(delivery.created_at),
        "delivered_at": optional_timestamp(delivery.delivered_at),
        "next_attempt_at": optional_timestamp(delivery.next_attempt_at)
        if delivery.status is DeliveryStatus.PENDING
        else None,
    }


def attempt_view(attempt: WebhookAttempt) -> DeliveryAttemptView:
    return {
        "number": attempt.number,
        "attempted_at": timestamp(attempt.attempted_at),
        "seconds": round(attempt.seconds, 3),
        "status_code": attempt.status_code,
        "error": attempt.error,
    }
