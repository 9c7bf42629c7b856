"""Tenants, each with a load row, and their API keys.

A key is `sk_<id>_<secret>`; only its id and a hash of its secret are stored. The hash is a plain SHA-256: the secret
has 256 random bits, so guessing need not be slowed down.
"""

import hashlib
import hmac
import secrets
import string
from collections.abc import Iterable, Sequence
from datetime import datetime
from uuid import UUID, uuid4

from sqlalchemy import func, or_, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from domain.access import OWN_SCOPES, Scope
from domain.errors import ExpectedError
from domain.stream_tokens import StreamToken
from storage.tables import DEFAULT_TENANT_ID, ApiKey, Tenant, TenantLoad


def create_tenant(
    session: Session, name: str, *, max_queued: int | None = None, weight: float = 1.0, max_priority: int = 0
) -> Tenant:
    """Create a tenant and its load row. Raises IntegrityError if the name is taken."""
    tenant = Tenant(id=uuid4(), name=name, max_queued=max_queued, weight=weight, max_priority=max_priority)
    session.add(tenant)
    session.flush()
    session.add(TenantLoad(tenant_id=tenant.id))
    session.flush()
    return tenant


def get_tenant(session: Session, tenant_id: UUID) -> Tenant | None:
    return session.get(Tenant, tenant_id)


def get_tenant_by_name(session: Session, name: str) -> Tenant | None:
    return session.scalar(select(Tenant).where(Tenant.name == name))


PREFIX = "sk"

ID_ALPHABET = string.ascii_letters + string.digits

ID_LENGTH = 8

MIN_SECRET_LENGTH = 16

MAX_KEY_LENGTH = 256


class MalformedKey(ExpectedError):
    """The key does not have the form sk_<id>_<secret>."""


def create_key(
    session: Session,
    tenant_id: UUID,
    *,
    name: str = "",
    expires_at: datetime | None = None,
    scopes: Iterable[Scope] = OWN_SCOPES,
) -> str:
    """Store a new key and return it; its secret cannot be read again."""
    key_id = "".join(secrets.choice(ID_ALPHABET) for _ in range(ID_LENGTH))
    secret = secrets.token_urlsafe(32)
    stored = ApiKey(id=key_id, tenant_id=tenant_id, secret_sha256=_sha256(secret), name=name, expires_at=expires_at)
    given = set(scopes)
    stored.is_admin = Scope.ADMIN in given
    stored.scopes = [scope.value for scope in Scope if scope in given - {Scope.ADMIN}]
    session.add(stored)
    session.flush()
    return f"{PREFIX}_{key_id}_{secret}"


def ensure_key(session: Session, key: str, tenant_id: UUID, *, name: str = "") -> bool:
    """Store a key made elsewhere (a deployment's bootstrap key). True if that changed anything: one with this id and
    secret stays as it is, disabled if it was. With another secret it is a new key. Raises MalformedKey."""
    key_id, secret = _parts(key)
    if len(secret) < MIN_SECRET_LENGTH:
        raise MalformedKey(
            f"the secret of key {key_id} has {len(secret)} characters; give at least {MIN_SECRET_LENGTH}"
        )
    stored = {"tenant_id": tenant_id, "secret_sha256": _sha256(secret), "name": name}
    values = stored | {"revoked_at": None, "expires_at": None}
    statement = insert(ApiKey).values(id=key_id, **values)
    is_other = ApiKey.secret_sha256 != statement.excluded.secret_sha256
    changing = statement.on_conflict_do_update(index_elements=[ApiKey.id], set_=values, where=is_other)
    return session.scalar(changing.returning(ApiKey.id)) is not None


def resolve_key(session: Session, key: str) -> ApiKey | None:
    """The row of a valid key; None if it is malformed, unknown, wrong, expired or disabled, or its tenant is, all in
    similar time."""
    try:
        key_id, secret = _parts(key)
    except MalformedKey:
        return None
    row = _live_key(session, key_id)
    stored = row.secret_sha256 if row is not None else bytes(32)
    return row if hmac.compare_digest(stored, _sha256(secret)) else None


def _live_key(session: Session, key_id: str) -> ApiKey | None:
    now = func.statement_timestamp()
    is_live = (ApiKey.revoked_at.is_(None), or_(ApiKey.expires_at.is_(None), ApiKey.expires_at > now))
    is_tenant_live = Tenant.disabled_at.is_(None)
    return session.scalar(select(ApiKey).join(Tenant).where(ApiKey.id == key_id, *is_live, is_tenant_live))


def sign(session: Session, token: StreamToken, tenant_id: UUID) -> str:
    """The token as text, signed for a tenant that exists."""
    return token.signed(session.scalars(select(Tenant.signing_key).where(Tenant.id == tenant_id)).one())


def reader_of(session: Session, token: StreamToken, *, needs_key: bool) -> UUID | None:
    """The tenant who had the token made; None if it is forged or expired or, where keys are needed, if its key is no
    longer valid."""
    if needs_key:
        key = _live_key(session, token.key_id)
        tenant_id = None if key is None else key.tenant_id
    else:
        tenant_id = DEFAULT_TENANT_ID
    signing_key = session.scalar(select(Tenant.signing_key).where(Tenant.id == tenant_id))
    is_valid = signing_key is not None and token.is_signed_with(signing_key) and not token.is_expired
    return tenant_id if is_valid else None


def revoke_key(session: Session, key_id: str, tenant_id: UUID) -> bool:
    """Revoke a key. False if the tenant has no such valid key."""
    statement = (
        update(ApiKey)
        .where(ApiKey.id == key_id, ApiKey.tenant_id == tenant_id, ApiKey.revoked_at.is_(None))
        .values(revoked_at=func.statement_timestamp())
        .returning(ApiKey.id)
    )
    return session.scalar(statement) is not None


def list_keys(session: Session, tenant_id: UUID) -> Sequence[ApiKey]:
    """All of a tenant's keys, including disabled ones, newest first."""
    statement = select(ApiKey).where(ApiKey.tenant_id == tenant_id).order_by(ApiKey.created_at.desc(), ApiKey.id)
    return session.scalars(statement.execution_options(populate_existing=True)).all()


def seal_key(session: Session, tenant_id: UUID) -> bytes:
    """The key that seals what the tenant's clients keep for us (domain/seals.py)."""
    signing_key = session.scalars(select(Tenant.signing_key).where(Tenant.id == tenant_id)).one()
    return hmac.digest(signing_key.bytes, b"seal", "sha256")  # another one than that of stream tokens


def _parts(key: str) -> tuple[str, str]:
    """Split a key into (id, secret). The error does not contain the key, which may be a secret."""
    parts = key.split("_", 2)
    is_well_formed = len(key) <= MAX_KEY_LENGTH and len(parts) == 3 and parts[0] == PREFIX and key.isascii()
    if not is_well_formed or not parts[1].isalnum() or not parts[2]:
        raise MalformedKey(f"an API key has the form {PREFIX}_<letters and digits>_<secret>")
    return parts[1], parts[2]


def _sha256(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()
