"""Tenants, keys and the audit log as administrators see them, in /v1/admin and as the JSON of `celeriac`."""

from dataclasses import replace
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, NotRequired

from pydantic import ConfigDict, Field, StringConstraints

from dialects.native import NO_NUL
from dialects.openai_views import PageView, Timestamp, View, optional_timestamp, timestamp
from domain.access import MAX_RETENTION_SECONDS, MIN_RETENTION_SECONDS, NO_LIMITS, OWN_SCOPES, Limits, Scope
from domain.jobs import FirstErrorModel, external_id
from storage.administration import MAX_WEIGHT, MIN_WEIGHT, KeyChanges, TenantChanges
from storage.limits_left import Left
from storage.tables import ApiKey, AuditEntry, Tenant

MAX_KEPT_SECONDS = 7 * 86_400  # for which a rotated key may stay valid

MAX_VALID_SECONDS = 3650 * 86_400

TenantName = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=NO_NUL)]
KeyName = Annotated[str, StringConstraints(max_length=256, pattern=NO_NUL)]


KEY_PRIORITY: Any = Field(
    default=None,
    ge=0,
    le=10,
    description="How far its jobs' priority counts among those of other tenants, within its tenant's max_priority.",
)


class AdminBody(FirstErrorModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TenantStandingBody(AdminBody):
    enabled: bool | None = Field(default=None, description="false: none of its keys is valid.")
    weight: float | None = Field(default=None, ge=MIN_WEIGHT, le=MAX_WEIGHT, description="Its share while others wait.")
    max_priority: int | None = Field(
        default=None, ge=0, le=10, description="How far its jobs' priority counts among the jobs of other tenants."
    )
    retention_seconds: int | None = Field(
        default=None,
        ge=MIN_RETENTION_SECONDS,
        le=MAX_RETENTION_SECONDS,
        description="How long its finished jobs are kept at most, whatever their result_ttl.",
    )
    limits: Limits | None = Field(default=None, description="All of its limits; those that are missing are removed.")

    def to_changes(self) -> TenantChanges:
        return TenantChanges(
            is_enabled=self.enabled,
            weight=self.weight,
            max_priority=self.max_priority,
            retention_seconds=self.retention_seconds,
            limits=_whole(self.limits),
        )


class TenantChangesBody(TenantStandingBody):
    """POST /v1/admin/tenants/{tenant}: the fields that are given are changed."""

    name: TenantName | None = Field(
        default=None, description="Its new name. Entries of the audit log keep the old one."
    )

    def to_changes(self) -> TenantChanges:
        return replace(super().to_changes(), name=self.name)


class TenantBody(TenantStandingBody):
    """POST /v1/admin/tenants."""

    name: TenantName


class KeyBody(AdminBody):
    """POST /v1/admin/keys."""

    tenant: TenantName = "default"
    name: KeyName = Field(default="", description="What the key is for.")
    scopes: list[Scope] = Field(default=list(OWN_SCOPES), min_length=1, max_length=8)
    expires_in_seconds: int | None = Field(default=None, ge=1, le=MAX_VALID_SECONDS)
    max_priority: int | None = KEY_PRIORITY
    limits: Limits = NO_LIMITS


class KeyChangesBody(AdminBody):
    """POST /v1/admin/keys/{key_id}: the fields that are given are changed."""

    enabled: bool | None = None
    name: KeyName | None = Field(default=None, description="What the key is for.")
    max_priority: int | None = KEY_PRIORITY
    limits: Limits | None = Field(default=None, description="All of its limits; those that are missing are removed.")

    def to_changes(self) -> KeyChanges:
        return KeyChanges(self.enabled, self.name, self.max_priority, _whole(self.limits))


class KeyRotationBody(AdminBody):
    """POST /v1/admin/keys/{key_id}/rotate."""

    keep_old_seconds: int = Field(default=0, ge=0, le=MAX_KEPT_SECONDS, description="How long the old one stays valid.")
    expires_in_seconds: int | None = Field(
        default=None, ge=1, le=MAX_VALID_SECONDS, description="When the new one expires. Default: as the old one."
    )


def _whole(limits: Limits | None) -> Limits:
    """Every limit set explicitly, if there are any."""
    return NO_LIMITS if limits is None else Limits(**limits.model_dump())


class LimitsView(View):
    requests_per_minute: int | None
    tokens_per_minute: int | None
    queued_jobs: int | None
    unfinished_jobs: int | None
    queued_tokens: int | None
    streams: int | None
    tokens_per_day: int | None
    tokens_per_month: int | None


class LeftView(View):
    """What is left of each limit now; null where there is none."""

    requests_per_minute: int | None
    tokens_per_minute: int | None
    queued_jobs: int | None
    unfinished_jobs: int | None
    queued_tokens: int | None
    streams: Annotated[None, Field(description="Each API process counts its own.")]
    tokens_per_day: int | None
    tokens_per_month: int | None


LEFT = Field(description="What is left of its limits. Not in lists, nor where it was just changed.")


class TenantAdminView(View):
    id: str
    object: Literal["tenant"]
    name: str
    enabled: bool
    weight: float
    max_priority: int
    retention_seconds: int
    limits: LimitsView
    left: NotRequired[Annotated[LeftView, LEFT]]
    created_at: Timestamp


class TenantAdminListView(PageView):
    data: list[TenantAdminView]


class ApiKeyView(View):
    id: str
    object: Literal["api_key"]
    tenant: str
    name: str
    scopes: list[Scope]
    status: Literal["valid", "disabled", "expired"]
    max_priority: int
    limits: LimitsView
    left: NotRequired[Annotated[LeftView, LEFT]]
    created_at: Timestamp
    expires_at: Timestamp | None
    disabled_at: Timestamp | None
    key: NotRequired[Annotated[str, Field(description="The key itself, only in the answer that creates it.")]]


class OwnKeyView(View):
    object: Literal["api_key"]
    id: Annotated[str | None, Field(description="null: no key is required here.")]
    scopes: list[Scope]


class StandingView(View):
    limits: LimitsView
    left: LeftView


class OwnLimitsView(View):
    object: Literal["limits"]
    key: Annotated[StandingView | None, Field(description="null: no key is required here.")]
    tenant: StandingView


class ApiKeyListView(PageView):
    data: list[ApiKeyView]


class AuditEntryView(View):
    id: str
    object: Literal["audit_entry"]
    changed_at: Timestamp
    actor: str
    action: str
    tenant: str
    key_id: str | None
    changes: dict[str, Any]


class AuditEntryListView(PageView):
    data: list[AuditEntryView]


def tenant_admin_view(tenant: Tenant, limits: Limits) -> TenantAdminView:
    return {
        "id": tenant.name,
        "object": "tenant",
        "name": tenant.name,
        "enabled": tenant.disabled_at is None,
        "weight": tenant.weight,
        "max_priority": tenant.max_priority,
        "retention_seconds": tenant.retention_seconds,
        "limits": _limits_view(limits),
        "created_at": timestamp(tenant.created_at),
    }


def api_key_view(key: ApiKey, tenant: str, limits: Limits) -> ApiKeyView:
    """Without `key`."""
    status: Literal["valid", "disabled", "expired"] = "valid"
    if key.revoked_at is not None:
        status = "disabled"
    elif key.expires_at is not None and key.expires_at <= datetime.now(UTC):
        status = "expired"
    return {
        "id": key.id,
        "object": "api_key",
        "tenant": tenant,
        "name": key.name,
        "scopes": sorted(key.all_scopes),
        "status": status,
        "max_priority": key.max_priority,
        "limits": _limits_view(limits),
        "created_at": timestamp(key.created_at),
        "expires_at": optional_timestamp(key.expires_at),
        "disabled_at": optional_timestamp(key.revoked_at),
    }


def audit_entry_view(entry: AuditEntry) -> AuditEntryView:
    return {
        "id": external_id(entry.id, "audit"),
        "object": "audit_entry",
        "changed_at": timestamp(entry.changed_at),
        "actor": entry.actor,
        "action": entry.action,
        "tenant": entry.tenant,
        "key_id": entry.key_id,
        "changes": entry.changes,
    }


def own_limits_view(of_key: tuple[Limits, Left] | None, of_tenant: tuple[Limits, Left]) -> OwnLimitsView:
    key = None if of_key is None else _standing_view(*of_key)
    return {"object": "limits", "key": key, "tenant": _standing_view(*of_tenant)}


def _standing_view(limits: Limits, left: Left) -> StandingView:
    return {"limits": _limits_view(limits), "left": left_view(left)}


def left_view(left: Left) -> LeftView:
    view: LeftView = left  # type: ignore[assignment]
    return view


def _limits_view(limits: Limits) -> LimitsView:
    view: LimitsView = limits.model_dump()  # type: ignore[assignment]
    return view
