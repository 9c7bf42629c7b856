"""Who asks: a Bearer key to its tenant, with a short memory so that a busy client costs no query per request."""

import hashlib
import time
from uuid import UUID

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from domain.errors import AuthenticationFailed, StorageUnavailable
from storage import api_keys
from storage.database import repeatable
from storage.tables import DEFAULT_TENANT_ID

REMEMBER_SECONDS = 5.0  # a revoked key is refused everywhere after this
MAX_REMEMBERED = 10_000


class Authenticator:
    """Resolves the Authorization header. Remembers answers, refusals too, by the hash of the key."""

    def __init__(self, sessions: async_sessionmaker[AsyncSession], *, is_open: bool) -> None:
        """`is_open`: no key is asked for and everything belongs to the default tenant."""
        self._sessions = sessions
        self._is_open = is_open
        self._remembered: dict[bytes, tuple[UUID | None, float]] = {}

    async def tenant_of(self, authorization: str | None) -> UUID:
        """Raises AuthenticationFailed, the same for every kind of wrong key, or StorageUnavailable."""
        if self._is_open:
            return DEFAULT_TENANT_ID
        key = _bearer_key(authorization)
        digest = hashlib.sha256(key.encode()).digest()
        tenant_id, until = self._remembered.get(digest, (None, 0.0))
        if time.monotonic() >= until:
            tenant_id = await self._look_up(key)
            self._remember(digest, tenant_id)
        if tenant_id is None:
            raise AuthenticationFailed("this API key is not known here; check it, or ask for a new one")
        return tenant_id

    async def _look_up(self, key: str) -> UUID | None:
        try:
            row = await repeatable(self._sessions, api_keys.resolve, key)
        except (SQLAlchemyError, OSError) as exc:
            raise StorageUnavailable("the database does not answer; retry in a moment", retry_after_seconds=2) from exc
        return None if row is None else row.tenant_id

    def _remember(self, digest: bytes, tenant_id: UUID | None) -> None:
        if len(self._remembered) >= MAX_REMEMBERED:
            self._remembered.clear()
        self._remembered[digest] = (tenant_id, time.monotonic() + REMEMBER_SECONDS)


def _bearer_key(authorization: str | None) -> str:
    scheme, _, key = (authorization or "").partition(" ")
    if not authorization:
        raise AuthenticationFailed("no API key was sent; send Authorization: Bearer <key>")
    if scheme.lower() != "bearer" or not key.strip():
        raise AuthenticationFailed("the Authorization header holds no key; send Authorization: Bearer <key>")
    return key.strip()
