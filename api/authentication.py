"""Who sends a request: keys and stream tokens, looked up in storage and watched while they have streams open."""

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar
from uuid import UUID

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session

from api.errors import database_unavailable
from api.signals import Signal
from domain.access import Scope, opened_by
from domain.errors import AuthenticationFailed, StorageUnavailable
from domain.jobs import parse_id
from domain.limits import CallerLimits
from domain.shares import NO_TENANT
from domain.stream_tokens import StreamToken
from storage import limits, tenants
from storage.database import POOL_TIMEOUT_SECONDS, repeatable, within
from storage.tables import DEFAULT_TENANT_ID

REMEMBER_SECONDS = 5.0  # how long a result is cached; after this, a revoked key is refused everywhere

RECHECK_SECONDS = 2.0  # between two checks of the keys that have streams open

OPEN_SECONDS = 1.0  # the longest that a request without a key waits for the limits of its tenant

# At a time, of keys that were valid, and as many of others: who sends keys at random delays only these.
MAX_LOOK_UPS = 2

MAX_REMEMBERED = 10_000  # keys

#: In which requests wait to begin whose keys or stream tokens are not known yet, by their hash: a wrong one that is
#: sent over and over is in the way of few others. No tenant has such an id.
NEW_LINES = tuple(UUID(bytes=b"\xff" * 15 + bytes([number])) for number in range(8))

EVERY_SCOPE = frozenset(Scope)

P = ParamSpec("P")

T = TypeVar("T")


class Identity(NamedTuple):
    tenant_id: UUID
    scopes: frozenset[Scope]  # of the routes that it may use
    key_id: str | None  # None: no key is required
    limits: CallerLimits


class Credential(NamedTuple):
    """A request's key or stream token."""

    identify: Callable[[], Coroutine[Any, Any, Identity]]
    revocation: Callable[[], Signal]  # set once it is revoked or expires
    is_key: bool = True  # so that its limits are for the caller to know


@dataclass(slots=True)
class Watch:
    """Of a key or token that has streams open."""

    look_up: Callable[[], Awaitable[object | None]]  # None once it is not valid any more
    revoked: Signal = field(default_factory=Signal)


class Authenticator:
    """Resolves the Authorization header. Caches results, including refusals, by the hash of the key."""

    def __init__(self, sessions: async_sessionmaker[AsyncSession], *, is_open: bool) -> None:
        """`is_open`: no key is required; every request belongs to the default tenant and has every scope."""
        self._sessions = sessions
        self._is_open = is_open
        self._remembered: dict[bytes, tuple[Identity, float]] = {}
        self._refused: dict[bytes, float] = {}  # until when
        self._looking_up: dict[bytes, asyncio.Task[Identity | None]] = {}
        self._places_of_known, self._places_of_others = asyncio.Semaphore(MAX_LOOK_UPS), asyncio.Semaphore(MAX_LOOK_UPS)
        self._watched: dict[str, Watch] = {}  # by key or token
        self._never = Signal()
        self._watching: asyncio.Task[None] | None = None
        self._open_limits = CallerLimits()  # of the default tenant, where no key is required
        self._open_until = 0.0  # monotonic; 0: they have not been looked up yet
        self._opening: asyncio.Task[None] | None = None

    async def aclose(self) -> None:
        for task in (self._watching, self._opening, *self._looking_up.values()):
            if task is not None:
                task.cancel()
                await asyncio.wait((task,))

    async def identify(self, authorization: str | None) -> Identity:
        """Raises AuthenticationFailed, with the same message for every kind of invalid key, or StorageUnavailable."""
        if self._is_open:
            return await self._identify_anybody()
        key = _bearer_key(authorization)
        digest = hashlib.sha256(key.encode()).digest()
        now = time.monotonic()
        identity, until = self._remembered.get(digest, (None, 0.0))
        if now >= until and now >= self._refused.get(digest, 0.0):
            identity = await self._look_up_once(digest, key)
        if identity is None:
            raise AuthenticationFailed("this API key is not valid; check it, or ask for a new one")
        return identity

    def line_of(self, authorization: str | None, token: str | None) -> UUID:
        """In which line a request waits to begin: that of whose key it was when it was last looked up; one of
        NEW_LINES for a key or stream token that must be looked up; NO_TENANT's for none and for refused ones."""
        if self._is_open:
            return DEFAULT_TENANT_ID
        key = (authorization or "").partition(" ")[2].strip()
        digest = hashlib.sha256(key.encode()).digest()
        identity, _ = self._remembered.get(digest, (None, 0.0))
        if identity is not None:
            return identity.tenant_id
        if token is not None and _may_be_valid(token):
            digest = hashlib.sha256(token.encode()).digest()
        elif not key or digest in self._refused:
            return NO_TENANT
        return NEW_LINES[digest[0] % len(NEW_LINES)]

    async def _look_up_once(self, digest: bytes, key: str) -> Identity | None:
        """All requests with this key that come meanwhile share one look-up."""
        task = self._looking_up.get(digest)
        if task is None:
            places = self._places_of_known if digest in self._remembered else self._places_of_others
            task = self._looking_up[digest] = asyncio.create_task(self._ask(places, _find_identity, key))
            task.add_done_callback(partial(self._note_found, digest))
        return await asyncio.shield(task)

    def _note_found(self, digest: bytes, task: "asyncio.Task[Identity | None]") -> None:
        del self._looking_up[digest]
        if not task.cancelled() and task.exception() is None:
            self._remember(digest, task.result())

    async def _identify_anybody(self) -> Identity:
        """Where no key is required. While the database does not answer, the limits that are known apply."""
        is_old = time.monotonic() >= self._open_until
        if is_old and (self._opening is None or self._opening.done()):
            self._opening = asyncio.create_task(self._look_up_open())
        if self._opening is not None and not self._open_until:
            await asyncio.shield(self._opening)  # the first request, which knows nothing yet
        return Identity(DEFAULT_TENANT_ID, EVERY_SCOPE, None, self._open_limits)

    async def _look_up_open(self) -> None:
        try:
            looking = self._ask(self._places_of_known, limits.limits_of_caller, DEFAULT_TENANT_ID, None)
            self._open_limits = await within(OPEN_SECONDS, looking)
        except (StorageUnavailable, TimeoutError):
            pass  # those that are known apply
        finally:
            self._open_until = time.monotonic() + REMEMBER_SECONDS

    async def identify_reader(self, token: str, job_id: str) -> Identity:
        """Whose job's stream the token opens. Raises AuthenticationFailed, with the same message for every kind of
        invalid token, or StorageUnavailable."""
        identity = await self._look_up_token(self._places_of_others, token, job_id)
        if identity is None:
            raise AuthenticationFailed(
                "this stream token is not valid for this job, or has expired; ask for a new one with "
                "POST /v1/jobs/{job_id}/stream_token",
                param="token",
            )
        return identity

    def revocation_of(self, authorization: str | None) -> Signal:
        """Is set once the key of an authenticated request is revoked or expires; never if no key is required. While the
        database does not answer, a key counts as valid."""
        if self._is_open:
            return self._never
        key = _bearer_key(authorization)
        return self._watched_for(key, partial(self._look_up_again, key))

    def expiry_of(self, token: str, job_id: str) -> Signal:
        """Is set once a valid stream token expires, or the key that it was made with is revoked."""
        return self._watched_for(token, partial(self._look_up_token, self._places_of_known, token, job_id))

    def _watched_for(self, credential: str, look_up: Callable[[], Awaitable[object | None]]) -> Signal:
        watch = self._watched.setdefault(credential, Watch(look_up))
        if self._watching is None or self._watching.done():
            self._watching = asyncio.create_task(self._watch())
        return watch.revoked

    async def _watch(self) -> None:
        """One query per key or token and round, however many streams it has open. Ends when no stream is open any
        more."""
        while self._watched:
            await asyncio.sleep(RECHECK_SECONDS)
            for credential, watch in list(self._watched.items()):
                if not watch.revoked.is_awaited:
                    del self._watched[credential]
                    continue
                try:
                    found = await watch.look_up()
                except StorageUnavailable:
                    break  # try again in the next round
                if found is None:
                    del self._watched[credential]  # whoever comes after it is valid again is watched anew
                    watch.revoked.set()

    async def _look_up_again(self, key: str) -> Identity | None:
        identity = await self._ask(self._places_of_known, _find_identity, key)
        if identity is None:
            self._remember(hashlib.sha256(key.encode()).digest(), None)
        return identity

    async def _look_up_token(self, places: asyncio.Semaphore, text: str, job_id: str) -> Identity | None:
        try:
            token = StreamToken.read(text)
            is_for_job = parse_id(job_id) == token.job_id
        except ValueError:
            return None
        if token.is_expired or not is_for_job:
            return None
        return await self._ask(places, _find_reader, token, needs_key=not self._is_open)

    async def _ask(
        self,
        places: asyncio.Semaphore,
        function: Callable[Concatenate[Session, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Raises StorageUnavailable, also if no place comes free in time."""
        try:
            async with asyncio.timeout(POOL_TIMEOUT_SECONDS):
                await places.acquire()
            try:
                return await repeatable(self._sessions, function, *args, **kwargs)
            finally:
                places.release()
        except (SQLAlchemyError, OSError) as exc:
            raise database_unavailable() from exc

    def _remember(self, digest: bytes, identity: Identity | None) -> None:
        until = time.monotonic() + REMEMBER_SECONDS
        self._remembered.pop(digest, None)
        found: dict[bytes, Any] = self._refused if identity is None else self._remembered
        if len(found) >= MAX_REMEMBERED:
            found.clear()
        found[digest] = until if identity is None else (identity, until)


def _find_identity(session: Session, key: str) -> Identity | None:
    row = tenants.resolve_key(session, key)
    if row is None:
        return None
    own = limits.limits_of_caller(session, row.tenant_id, row.id)
    return Identity(row.tenant_id, opened_by(row.all_scopes), row.id, own)


def _find_reader(session: Session, token: StreamToken, *, needs_key: bool) -> Identity | None:
    """It reads as whoever asked for it, and its streams count as theirs."""
    tenant_id = tenants.reader_of(session, token, needs_key=needs_key)
    if tenant_id is None:
        return None
    key_id = token.key_id if needs_key else None
    own = limits.limits_of_caller(session, tenant_id, key_id)
    return Identity(tenant_id, frozenset({Scope.READ}), token.key_id, own)


def _may_be_valid(token: str) -> bool:
    try:
        return not StreamToken.read(token).is_expired
    except ValueError:
        return False


def _bearer_key(authorization: str | None) -> str:
    scheme, _, key = (authorization or "").partition(" ")
    if not authorization:
        raise AuthenticationFailed("there is no API key; send Authorization: Bearer <key>")
    if scheme.lower() != "bearer" or not key.strip():
        raise AuthenticationFailed("the Authorization header has no bearer key; send Authorization: Bearer <key>")
    return key.strip()
