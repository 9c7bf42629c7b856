"""Who asks: a Bearer key to its tenant, with a short memory so that a busy client costs no query per request."""

import asyncio
import hashlib
import time
from typing import NamedTuple
from uuid import UUID

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from domain.errors import AuthenticationFailed, StorageUnavailable
from storage import tenants
from storage.database import repeatable
from storage.tables import DEFAULT_TENANT_ID

REMEMBER_SECONDS = 5.0  # a revoked key is refused everywhere after this
RECHECK_SECONDS = 2.0  # and what it has opened and still reads ends after this
MAX_REMEMBERED = 10_000


class Identity(NamedTuple):
    tenant_id: UUID
    is_admin: bool


class Authenticator:
    """Resolves the Authorization header. Remembers answers, refusals too, by the hash of the key."""

    def __init__(self, sessions: async_sessionmaker[AsyncSession], *, is_open: bool) -> None:
        """`is_open`: no key is required; every request belongs to the default tenant and is an admin's."""
        self._sessions = sessions
        self._is_open = is_open
        self._remembered: dict[bytes, tuple[Identity | None, float]] = {}
        self._watched: dict[str, tuple[asyncio.Event, int]] = {}  # by key: set when it is dead; how many wait
        self._watching: asyncio.Task[None] | None = None

    async def aclose(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait((self._watching,))

    async def identify(self, authorization: str | None) -> Identity:
        """Raises AuthenticationFailed, the same for every kind of wrong key, or StorageUnavailable."""
        if self._is_open:
            return Identity(DEFAULT_TENANT_ID, is_admin=True)
        key = _bearer_key(authorization)
        digest = hashlib.sha256(key.encode()).digest()
        identity, until = self._remembered.get(digest, (None, 0.0))
        if time.monotonic() >= until:
            identity = await self._look_up(key)
            self._remember(digest, identity)
        if identity is None:
            raise AuthenticationFailed("this API key is not known here; check it, or ask for a new one")
        return identity

    async def wait_until_revoked(self, authorization: str | None) -> None:
        """Returns once the key of an identified request is revoked or expired; never if no key is required. A database
        that does not answer revokes nothing."""
        if self._is_open:
            await asyncio.Event().wait()
        key = _bearer_key(authorization)
        dead, num_waiting = self._watched.get(key, (asyncio.Event(), 0))
        self._watched[key] = dead, num_waiting + 1
        if self._watching is None or self._watching.done():
            self._watching = asyncio.create_task(self._watch())
        try:
            await dead.wait()
        finally:
            dead, num_waiting = self._watched.pop(key)
            if num_waiting > 1:
                self._watched[key] = dead, num_waiting - 1

    async def _watch(self) -> None:
        """One question per key and round, however many streams it has open; ends when nothing is open any more."""
        while self._watched:
            await asyncio.sleep(RECHECK_SECONDS)
            for key, (dead, _) in list(self._watched.items()):
                try:
                    identity = await self._look_up(key)
                except StorageUnavailable:
                    break  # ask again in the next round
                if identity is None:
                    self._remember(hashlib.sha256(key.encode()).digest(), None)
                    dead.set()

    async def _look_up(self, key: str) -> Identity | None:
        try:
            row = await repeatable(self._sessions, tenants.resolve_key, key)
        except (SQLAlchemyError, OSError) as exc:
            raise StorageUnavailable("the database does not answer; retry in a moment", retry_after_seconds=2) from exc
        return None if row is None else Identity(row.tenant_id, row.is_admin)

    def _remember(self, digest: bytes, identity: Identity | None) -> None:
        if len(self._remembered) >= MAX_REMEMBERED:
            self._remembered.clear()
        self._remembered[digest] = (identity, time.monotonic() + REMEMBER_SECONDS)


def _bearer_key(authorization: str | None) -> str:
    scheme, _, key = (authorization or "").partition(" ")
    if not authorization:
        raise AuthenticationFailed("no API key was sent; send Authorization: Bearer <key>")
    if scheme.lower() != "bearer" or not key.strip():
        raise AuthenticationFailed("the Authorization header holds no key; send Authorization: Bearer <key>")
    return key.strip()
