"""What administrators do to tenants and keys. Each change and its entry in the audit log are one transaction.

All functions are synchronous on a `Session` and do not commit. `actor` is who does it: `key <id>` or a user of a
machine.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import Session

from domain.access import NO_LIMITS, OWN_SCOPES, Limits, Scope, is_tenant_name
from domain.errors import InvalidCursor, InvalidRequest, NotFound
from domain.jobs import new_id
from storage import limits, tenants
from storage.limits import LimitSet
from storage.tables import DEFAULT_TENANT_ID, ApiKey, AuditEntry, Job, Tenant, TenantLoad

MIN_WEIGHT, MAX_WEIGHT = 0.001, 1000.0  # virtual time, which is divided by it, must stay finite


@dataclass(frozen=True, slots=True)
class TenantChanges:
    """None: unchanged."""

    is_enabled: bool | None = None
    name: str | None = None
    weight: float | None = None
    max_priority: int | None = None
    retention_seconds: int | None = None
    limits: Limits = NO_LIMITS  # those that are set in it

    def as_json(self) -> dict[str, Any]:
        return _given(
            enabled=self.is_enabled,
            name=self.name,
            weight=self.weight,
            max_priority=self.max_priority,
            retention_seconds=self.retention_seconds,
            limits=_limits_json(self.limits),
        )


@dataclass(frozen=True, slots=True)
class KeyChanges:
    """None: unchanged."""

    is_enabled: bool | None = None
    name: str | None = None
    max_priority: int | None = None
    limits: Limits = NO_LIMITS

    def as_json(self) -> dict[str, Any]:
        return _given(
            enabled=self.is_enabled,
            name=self.name,
            max_priority=self.max_priority,
            limits=_limits_json(self.limits),
        )


@dataclass(frozen=True, slots=True)
class NewKey:
    row: ApiKey
    text: str  # the key itself, which cannot be read again


def find_tenant(session: Session, name: str, *, is_locked: bool = False) -> Tenant:
    """Raises NotFound. `is_locked`: against other changes. Jobs of the tenant are still accepted: they hold its limits,
    which a change needs next, and refer to its row."""
    statement = select(Tenant).where(Tenant.name == _storable(name))
    tenant = session.scalar(statement.with_for_update(key_share=True) if is_locked else statement)
    if tenant is None:
        raise NotFound(f"there is no tenant {name[:64]!r}; create it: celeriac tenants create {name[:64]}")
    return tenant


def find_key(session: Session, key_id: str, *, is_locked: bool = False) -> ApiKey:
    """Raises NotFound."""
    statement = select(ApiKey).where(ApiKey.id == _storable(key_id))
    key = session.scalar(statement.with_for_update() if is_locked else statement)
    if key is not None:
        return key
    prefix, _, rest = key_id.partition("_")
    if prefix == tenants.PREFIX and rest:  # whose end may be the secret
        id_ = rest.partition("_")[0]
        raise NotFound(f"a key is named by its id, the part after its first underscore; give {id_[:64]!r} alone")
    raise NotFound(f"there is no key with the id {key_id[:64]!r}; list them: celeriac keys list --all")


def list_tenants(session: Session, *, after: str | None = None, limit: int = 10_000) -> Sequence[Tenant]:
    """In the order of their names."""
    later = () if after is None else (Tenant.name > _storable(after),)
    return session.scalars(select(Tenant).where(*later).order_by(Tenant.name).limit(limit)).all()


def list_keys(
    session: Session, *, tenant_id: UUID | None = None, after: str | None = None, limit: int = 10_000
) -> Sequence[ApiKey]:
    """Newest first: of one tenant or of all. `after` is the id of a key. Raises InvalidCursor."""
    own = () if tenant_id is None else (ApiKey.tenant_id == tenant_id,)
    older: tuple[ColumnElement[bool], ...] = ()
    if after is not None:
        last = session.get(ApiKey, _storable(after))
        if last is None:
            raise InvalidCursor(
                f"after is {after[:64]!r}, and there is no such key; send the last_id of a page", param="after"
            )
        older = (func.row(ApiKey.created_at, ApiKey.id) < func.row(last.created_at, last.id),)
    statement = select(ApiKey).where(*own, *older).order_by(ApiKey.created_at.desc(), ApiKey.id.desc()).limit(limit)
    return session.scalars(statement).all()


def names_of_tenants(session: Session, ids: Iterable[UUID]) -> dict[UUID, str]:
    rows = session.execute(select(Tenant.id, Tenant.name).where(Tenant.id.in_(set(ids))))
    return {row.id: row.name for row in rows}


def create_tenant(session: Session, name: str, changes: TenantChanges, *, actor: str) -> Tenant:
    """Raises InvalidRequest if the name is taken or cannot be one."""
    _take_name(session, name)
    tenant = tenants.create_tenant(session, name)
    _apply(session, tenant, changes)
    _note(session, actor, "tenant.create", name, changes=changes.as_json())
    return tenant


def _take_name(session: Session, name: str) -> None:
    """Until the end of the transaction nobody else gets it. Raises InvalidRequest."""
    if not is_tenant_name(name):
        raise InvalidRequest(
            f"name is {name[:64]!r}; a tenant's name has 1 to 64 letters, digits or . _ @ -, and begins with a letter "
            "or digit",
            param="name",
        )
    session.execute(select(func.pg_advisory_xact_lock(func.hashtext(f"tenant {name}"))))
    if tenants.get_tenant_by_name(session, name) is not None:
        raise InvalidRequest(
            f"name is {name!r}, and there is such a tenant already; choose another, or change it: "
            f"celeriac tenants limit {name}",
            param="name",
        )


def change_tenant(session: Session, name: str, changes: TenantChanges, *, actor: str) -> Tenant:
    """Raises NotFound, or InvalidRequest."""
    tenant = find_tenant(session, name, is_locked=True)
    if changes.name is not None and changes.name != name:
        if tenant.id == DEFAULT_TENANT_ID:
            raise InvalidRequest(f"{name} is the tenant of requests without a key and keeps its name", param="name")
        _take_name(session, changes.name)
    _apply(session, tenant, changes)
    if changes.name is not None:
        # Last: a unique name locks the row against accepts, which hold the limits that were changed above.
        tenant.name = changes.name
        session.flush()
    _note(session, actor, "tenant.change", name, changes=changes.as_json())
    return tenant


def _apply(session: Session, tenant: Tenant, changes: TenantChanges) -> None:
    if changes.is_enabled is not None and changes.is_enabled == (tenant.disabled_at is not None):
        tenant.disabled_at = None if changes.is_enabled else session.scalar(select(func.statement_timestamp()))
    if changes.weight is not None:
        if not MIN_WEIGHT <= changes.weight <= MAX_WEIGHT:  # NaN, too
            raise InvalidRequest(
                f"weight is {changes.weight}; give a number from {MIN_WEIGHT} to {MAX_WEIGHT:.0f}", param="weight"
            )
        tenant.weight = changes.weight
    if changes.max_priority is not None:
        tenant.max_priority = changes.max_priority
    if changes.retention_seconds is not None:
        tenant.retention_seconds = changes.retention_seconds
    limits.change_tenant_limits(session, tenant, changes.limits)
    session.flush()


def delete_tenant(session: Session, name: str, *, actor: str) -> None:
    """Also deletes its keys, files and webhooks. Raises NotFound, or InvalidRequest while it has jobs."""
    tenant = find_tenant(session, name)
    # What accepts, and changes of keys, lock before the tenant's own row. The delete would lock them after it.
    for rows, order in ((ApiKey, ApiKey.id), (LimitSet, LimitSet.key_id), (TenantLoad, TenantLoad.tenant_id)):
        session.execute(select(order).where(rows.tenant_id == tenant.id).order_by(order).with_for_update())
    session.refresh(tenant, with_for_update=True)
    if tenant.id == DEFAULT_TENANT_ID:
        raise InvalidRequest(
            f"{name} is the tenant of requests without a key and cannot be deleted; disable its keys instead"
        )
    if session.scalar(select(Job.id).where(Job.tenant_id == tenant.id).limit(1)) is not None:
        raise InvalidRequest(
            f"{name} still has jobs; disable it (celeriac tenants disable {name}), let those that have ended go "
            f"(celeriac tenants limit {name} --retention-seconds 60), and delete it a minute or two after its last job"
        )
    tenant_id = tenant.id
    session.delete(tenant)
    session.flush()
    _note(session, actor, "tenant.delete", name, changes={"id": str(tenant_id)})  # by which its usage is kept


def note_erasure(session: Session, action: str, tenant: str, what: Mapping[str, Any], *, actor: str) -> None:
    """`what` says by which key or name of metadata, and at the end how much was erased, but not whose it was."""
    _note(session, actor, action, tenant, changes=what)


def note_pull(session: Session, action: str, model: str, what: Mapping[str, Any], *, actor: str) -> None:
    """A pull concerns no tenant."""
    _note(session, actor, action, "", changes={"model": model, **what})


def create_key(
    session: Session,
    tenant: Tenant,
    *,
    name: str = "",
    expires_at: datetime | None = None,
    scopes: Iterable[Scope] = OWN_SCOPES,
    max_priority: int | None = None,
    key_limits: Limits = NO_LIMITS,
    actor: str,
) -> NewKey:
    given = frozenset(scopes)
    text = tenants.create_key(session, tenant.id, name=name, expires_at=expires_at, scopes=given)
    row = find_key(session, text.split("_")[1])
    if max_priority is not None:
        row.max_priority = max_priority
    limits.change_key_limits(session, tenant.id, row.id, key_limits)
    changes = _given(
        name=name or None,
        expires_at=expires_at and expires_at.isoformat(timespec="seconds"),
        scopes=sorted(given),
        max_priority=max_priority,
        limits=_limits_json(key_limits),
    )
    _note(session, actor, "key.create", tenant.name, row.id, changes)
    return NewKey(row, text)


def ensure_key(session: Session, key: str, *, name: str, actor: str) -> bool:
    """Store a key made elsewhere for the default tenant, if it is new. False if it is not valid: an administrator has
    disabled it or its tenant, or let it expire. Raises MalformedKey."""
    if tenants.ensure_key(session, key, DEFAULT_TENANT_ID, name=name):
        row = find_key(session, key.split("_")[1])
        _note(session, actor, "key.create", _name_of(session, row), row.id, _given(name=name))
    return tenants.resolve_key(session, key) is not None


def change_key(session: Session, key_id: str, changes: KeyChanges, *, actor: str) -> ApiKey:
    """Raises NotFound."""
    row = find_key(session, key_id, is_locked=True)
    if changes.is_enabled is not None and changes.is_enabled == (row.revoked_at is not None):
        row.revoked_at = None if changes.is_enabled else session.scalar(select(func.statement_timestamp()))
    if changes.max_priority is not None:
        row.max_priority = changes.max_priority
    old_name = row.name
    if changes.name is not None:
        row.name = changes.name
    limits.change_key_limits(session, row.tenant_id, key_id, changes.limits)
    session.flush()
    renamed = {"old_name": old_name} if row.name != old_name else {}
    _note(session, actor, "key.change", _name_of(session, row), key_id, changes.as_json() | renamed)
    return row


def rotate_key(
    session: Session,
    key_id: str,
    *,
    keep_old_until: datetime | None,
    expires_at: datetime | None = None,
    actor: str,
) -> NewKey:
    """Make a key to take this one's place, with all that it may do and its limits. It expires at `expires_at`, or when
    the old one would have. The old one is disabled at once, or expires at `keep_old_until`. Raises NotFound, or
    InvalidRequest if it is not valid any more."""
    old = find_key(session, key_id, is_locked=True)
    now = session.scalars(select(func.statement_timestamp())).one()
    if old.revoked_at is not None or (old.expires_at is not None and old.expires_at <= now):
        raise InvalidRequest(f"the key {key_id} is disabled or has expired, so nothing can take its place; create one")
    until = expires_at or old.expires_at
    text = tenants.create_key(session, old.tenant_id, name=old.name, expires_at=until, scopes=old.all_scopes)
    new = find_key(session, text.split("_")[1])
    new.max_priority = old.max_priority
    limits.copy_limits(session, old.tenant_id, key_id, to_key_id=new.id)
    if keep_old_until is None:
        old.revoked_at = now
    else:
        old.expires_at = min(keep_old_until, old.expires_at or keep_old_until)
    session.flush()
    kept = keep_old_until and keep_old_until.isoformat(timespec="seconds")
    ends = expires_at and expires_at.isoformat(timespec="seconds")
    changes = _given(new_key_id=new.id, kept_until=kept, expires_at=ends)
    _note(session, actor, "key.rotate", _name_of(session, old), key_id, changes)
    return NewKey(new, text)


def delete_key(session: Session, key_id: str, *, actor: str) -> None:
    """Its jobs stay. Raises NotFound."""
    row = find_key(session, key_id, is_locked=True)
    name = _name_of(session, row)
    limits.forget_limits(session, row.tenant_id, key_id)
    session.delete(row)
    session.flush()
    _note(session, actor, "key.delete", name, key_id)


def list_audit(session: Session, *, after: UUID | None = None, limit: int = 10_000) -> Sequence[AuditEntry]:
    """Newest first. `after` is the id of an entry."""
    older = () if after is None else (AuditEntry.id < after,)
    return session.scalars(select(AuditEntry).where(*older).order_by(AuditEntry.id.desc()).limit(limit)).all()


def _storable(text: str) -> str:
    """`text` without U+0000, which no name or id contains and PostgreSQL refuses."""
    return text.replace("\0", "")


def _note(
    session: Session,
    actor: str,
    action: str,
    tenant: str,
    key_id: str | None = None,
    changes: Mapping[str, Any] | None = None,
) -> None:
    session.add(
        AuditEntry(id=new_id(), actor=actor, action=action, tenant=tenant, key_id=key_id, changes=dict(changes or {}))
    )
    session.flush()


def _name_of(session: Session, key: ApiKey) -> str:
    return session.get_one(Tenant, key.tenant_id).name


def _given(**values: object) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _limits_json(given: Limits) -> dict[str, int | None] | None:
    return given.model_dump(exclude_unset=True) or None
