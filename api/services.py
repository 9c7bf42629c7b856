"""The services that all requests of an API process share, and the base class of private routes."""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar
from urllib.parse import parse_qsl
from uuid import UUID

import redis.asyncio
from fastapi import APIRouter, Response
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session
from starlette.requests import HTTPConnection, Request
from starlette.types import Scope as AsgiScope

from api.authentication import REMEMBER_SECONDS, Authenticator, Credential
from api.errors import database_unavailable
from api.examiner import Examiner
from api.exposition import Exposition
from api.known_bodies import KnownBodies
from api.limits import (
    LargeWork,
    RequestPlaces,
    StreamPlaces,
)
from api.openapi import NEEDS_KEY, REFUSALS
from api.queue_monitor import QueueMonitor
from api.request_headers import header_of
from api.routes import DirectRoute, Handler
from api.scopes import scope_of
from api.shared_frames import SharedFrames
from api.shared_reads import SharedReads
from api.signals import Signal
from api.starts import GONE, UNHELD_PATHS, Starts
from dialects.native import QueueView
from domain.access import Scope
from domain.catalog import Catalog
from domain.errors import JobUnreadable, PermissionDenied, StorageFull
from domain.jobs import JobStatus
from domain.limits import is_limited_context, note_caller, stream_limits_context
from domain.requests import TokenChunk
from domain.shares import SharedTurns, current_tenant
from observability import describe_exception, key_id_context
from settings import Settings
from storage import job_queries, jobs
from storage.database import OUTAGES, repeatable, within
from storage.job_queries import JobRecord
from storage.stream_channels import REDIS_OUTAGES, channel_of
from storage.streams import StreamMessage, StreamReader
from tasks import job_log
from tasks.dispatch import Dispatcher
from tasks.submit import Submitter
from text.models import ModelViews

log = logging.getLogger(__name__)

P = ParamSpec("P")

T = TypeVar("T")

DISK_FULL = "53100"  # PostgreSQL's SQLSTATE

ANNOUNCE_SECONDS = 0.5  # how long Redis may take to publish a transition

AFTER_ALL_CHUNKS = 2**31 - 1  # a stream that begins here has status changes only

ANSWER_SECONDS = 5.0  # how long a query may take before the client gets a 503

MAX_WAITING = 4_096  # reads, and as many writes


@dataclass(slots=True)
class Services:
    """Shared by all requests of a process; to be used on its event loop only."""

    settings: Settings
    catalog: Catalog
    views: ModelViews
    sessions: async_sessionmaker[AsyncSession]  # transactions of the request's tenant
    statements: async_sessionmaker[AsyncSession]  # the same, autocommit
    system_sessions: async_sessionmaker[AsyncSession]  # transactions across tenants
    system_statements: async_sessionmaker[AsyncSession]  # the same, autocommit
    redis: "redis.asyncio.Redis"
    authenticator: Authenticator
    submitter: Submitter
    dispatcher: Dispatcher
    monitor: QueueMonitor
    examiner: Examiner
    streams: StreamReader
    slots: StreamPlaces
    large_work: LargeWork
    uploads: RequestPlaces
    downloads: RequestPlaces
    large_bodies: RequestPlaces
    read_turns: SharedTurns
    write_turns: SharedTurns
    draining: Signal  # set on SIGTERM: no longer ready, and streams end that their readers can resume
    last_call: Signal  # set CELERIAC_API_DRAIN_SECONDS later: all others end, too
    frames: SharedFrames = field(default_factory=SharedFrames)
    exposition: Exposition = field(default_factory=Exposition)
    starts: Starts = field(default_factory=Starts)
    known_bodies: KnownBodies = field(default_factory=KnownBodies)
    streamed_jobs: SharedReads[JobRecord | None] = field(default_factory=SharedReads)
    terminal_frames: SharedReads[list[bytes]] = field(default_factory=SharedReads)
    background: set["asyncio.Task[None]"] = field(default_factory=set)  # the tasks of `spawn` that are not done
    delivered: list[UUID] = field(default_factory=list)  # jobs for `note_delivered`, while others are being written
    is_noting_delivered: bool = False

    async def read(self, function: Callable[Concatenate[Session, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a read-only storage function, for the request's tenant. Raises StorageUnavailable."""
        return await self._query(self.read_turns, repeatable(self.statements, function, *args, **kwargs))

    async def system_read(self, function: Callable[Concatenate[Session, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """As `read`, across tenants."""
        return await self._query(self.read_turns, repeatable(self.system_statements, function, *args, **kwargs))

    async def write(self, function: Callable[Concatenate[Session, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a storage function for the request's tenant, and commit. Raises StorageFull, or StorageUnavailable: then
        it may have been committed."""
        return await self._query(self.write_turns, _write(self.sessions, function, *args, **kwargs))

    async def system_write(
        self, function: Callable[Concatenate[Session, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """As `write`, across tenants."""
        return await self._query(self.write_turns, _write(self.system_sessions, function, *args, **kwargs))

    async def _query(self, turns: SharedTurns, query: Coroutine[Any, Any, T]) -> T:
        return await self._bounded(self._in_turn(turns, query))

    async def _in_turn(self, turns: SharedTurns, query: Coroutine[Any, Any, T]) -> T:
        """If the caller gives up before its turn, the query does not run at all."""
        tenant_id = current_tenant.get()
        try:
            await turns.take(tenant_id)
        except BaseException:
            query.close()
            raise
        # A query to a server that hangs cannot be cancelled until the server answers. So it is abandoned instead, and
        # keeps its turn, as it keeps its connection.
        task = asyncio.create_task(query)
        task.add_done_callback(partial(_end_turn, turns, tenant_id))
        return await asyncio.shield(task)

    async def _bounded(self, answer: Coroutine[Any, Any, T]) -> T:
        """What the database has answered within ANSWER_SECONDS. Raises StorageFull or StorageUnavailable."""
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                return await answer
        except (*OUTAGES, OSError, TimeoutError) as exc:
            if getattr(getattr(exc, "orig", None), "sqlstate", None) == DISK_FULL:
                raise StorageFull("the disk of the database is full; nothing was stored, retry later") from exc
            raise database_unavailable() from exc

    # The monitor batches its own queries and pauses between them, so that its callers take no turns while they wait.

    async def position(self, job_id: UUID, model: str) -> QueueView | None:
        """The place of a queued job; None if it is no longer queued. Raises StorageUnavailable."""
        return await self._bounded(self.monitor.position(job_id, model))

    async def refresh_queues(self) -> None:
        """Read the queues now, so that later requests to this process see a change. Raises StorageUnavailable."""
        await self._bounded(self.monitor.read(max_age_seconds=0))

    async def wait_for_end(self, job_id: UUID, seconds: float) -> None:
        """Returns when the job has ended or was deleted, when the time is over, or when this server drains; at once if
        all stream slots are taken. The caller has checked the job's tenant."""
        await self._wait_for(self.read_to_end(job_id), seconds)

    async def wait_for_news(self, job_id: UUID, seconds: float, *, after: int) -> None:
        """As `wait_for_end`, but returns as soon as there is a chunk with a sequence number above `after`."""
        await self._wait_for(self._read_one(job_id, after), seconds)

    async def _wait_for(self, work: Coroutine[Any, Any, None], seconds: float) -> None:
        if self.slots.is_full:
            work.close()
            return
        drained = asyncio.create_task(self.draining.wait())
        done = asyncio.create_task(work)
        try:
            with self.slots.hold():
                await asyncio.wait((drained, done), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (drained, done):
                task.cancel()
            await asyncio.wait((drained, done))

    async def _read_one(self, job_id: UUID, after: int) -> None:
        with suppress(JobUnreadable):  # whoever waited for it reads it next, and is told
            async with aclosing(self.streams.read(job_id, starting_after=after)) as events:
                async for event in events:
                    if isinstance(event, TokenChunk):
                        return

    async def read_to_end(self, job_id: UUID) -> None:
        """Returns when the job has ended or was deleted. The caller has checked the job's tenant."""
        async with aclosing(self.streams.read(job_id, starting_after=AFTER_ALL_CHUNKS)) as events:
            async for _ in events:
                pass

    async def cancel(self, job_id: UUID, tenant_id: UUID) -> JobStatus | None:
        """Cancel a queued job at once, or stop a running one within a step. Returns the job's status afterwards, or
        None if the tenant has no such job. Raises StorageUnavailable."""
        job = await self.write(jobs.cancel, job_id, tenant_id)
        if job is None:
            return None
        if job.status is JobStatus.IN_PROGRESS:
            self.dispatcher.revoke_running(job_id)
        elif job.is_moved:
            job_log.ended_without_worker([job])
            await self.announce(job_id, job.status)
        return job.status

    def note_delivered(self, job_id: UUID) -> None:
        """Record soon that a client has received the job's whole answer; those of one moment in one statement."""
        self.delivered.append(job_id)
        if not self.is_noting_delivered:
            self.is_noting_delivered = True
            self.spawn(self._write_delivered())

    async def _write_delivered(self) -> None:
        try:
            while job_ids := self.delivered:
                self.delivered = []
                await within(ANSWER_SECONDS, repeatable(self.system_statements, job_queries.mark_delivered, job_ids))
        finally:
            self.is_noting_delivered = False

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` in the background, past the end of the request. It is cancelled when this process ends."""
        task = asyncio.create_task(work)
        self.background.add(task)
        task.add_done_callback(self._forget)

    def _forget(self, task: "asyncio.Task[None]") -> None:
        self.background.discard(task)
        if not task.cancelled() and (exc := task.exception()) is not None:
            log.warning("background task failed", extra={"reason": describe_exception(exc)})

    async def cancel_spawned(self) -> None:
        tasks = list(self.background)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def announce(self, job_id: UUID, status: JobStatus) -> None:
        """Notify open streams of a committed transition. Best effort: they would notice it by themselves, but later."""
        message = StreamMessage(status=status).model_dump_json(exclude_defaults=True)
        try:
            async with asyncio.timeout(ANNOUNCE_SECONDS):
                await self.redis.publish(channel_of(job_id), message)
        except REDIS_OUTAGES as exc:
            log.warning("could not notify streams of a transition", extra={"reason": describe_exception(exc)})


async def _write(
    sessions: async_sessionmaker[AsyncSession],
    function: Callable[Concatenate[Session, P], T],
    *args: P.args,
    **kwargs: P.kwargs,
) -> T:
    async with sessions.begin() as session:
        return await session.run_sync(function, *args, **kwargs)


def turns_of_queries(num_at_once: int, *, is_shared: bool) -> SharedTurns:
    what = "requests are waiting for the database"
    return SharedTurns(num_at_once, max_waiting=MAX_WAITING, what=what, is_shared=is_shared)


def _end_turn(turns: SharedTurns, tenant_id: UUID, task: "asyncio.Task[Any]") -> None:
    """Also retrieves the exception of an abandoned task, so that asyncio does not report it."""
    turns.leave(tenant_id)
    if not task.cancelled():
        task.exception()


class Caller(NamedTuple):
    services: Services
    tenant_id: UUID


def stream_router(section: str) -> APIRouter:
    """As `private_router`, for routes of one job's stream (`{job_id}` in their paths), which stream tokens may read."""
    return APIRouter(route_class=StreamRoute, responses=REFUSALS, tags=[section])


def private_router(section: str) -> APIRouter:
    """For all routes but health checks and pages. None of its routes answers without a valid key. `section` is their
    heading in the OpenAPI document."""
    return APIRouter(route_class=PrivateRoute, responses=REFUSALS, tags=[section])


class PrivateRoute(DirectRoute):
    """Authenticates before anything else happens. Not a FastAPI dependency, as resolving one would cost more than all
    other work before the route function."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        """Raises ValueError if api/scopes.py does not say what scope the route needs."""
        self.scope = self.find_scope(options.get("methods") or ["GET"], path)
        options["openapi_extra"] = NEEDS_KEY | (options.get("openapi_extra") or {})
        super().__init__(path, endpoint, **options)

    def get_route_handler(self) -> Handler:
        answer = super().get_route_handler()

        async def answer_authenticated(request: Request) -> Response:
            credential = self.credential_of(request)
            await authenticate(request, credential, self.scope)
            started = time.monotonic()
            response = await answer(request)
            # A key revoked during a long poll gets no answer. What other methods do is done by now, and a 401 would say
            # that it is not.
            if request.method == "GET" and time.monotonic() - started > REMEMBER_SECONDS:
                await credential.identify()
            return response

        return answer_authenticated

    def credential_of(self, request: Request) -> Credential:
        return credential_in_headers(services_of(request), request)

    def find_scope(self, methods: Sequence[str], path: str) -> Scope | None:
        """That a key needs for the route; None if any key will do."""
        return scope_of(methods, path)


class AnyKeyRoute(PrivateRoute):
    """For every valid key, whatever its scopes."""

    def find_scope(self, methods: Sequence[str], path: str) -> Scope | None:
        return None


class StreamRoute(PrivateRoute):
    """A private GET route of one job's stream, which `?token=`, a stream token, opens as well. If there is one, it
    decides."""

    def credential_of(self, request: Request) -> Credential:
        token = request.query_params.get("token")
        if token is None:
            return super().credential_of(request)
        job_id = request.path_params["job_id"]
        authenticator = services_of(request).authenticator
        return Credential(
            partial(authenticator.identify_reader, token, job_id),
            partial(authenticator.expiry_of, token, job_id),
            is_key=False,
        )


async def authenticate(connection: HTTPConnection, credential: Credential, scope: Scope | None) -> None:
    """Set whose request or WebSocket it is. Raises AuthenticationFailed, PermissionDenied if the key does not have
    `scope`, or StorageUnavailable."""
    state = connection.state
    identity = await credential.identify()
    if credential.is_key:
        note_caller(identity.limits)
    if scope is not None and scope not in identity.scopes:
        held = ", ".join(sorted(identity.scopes)) or "none"
        raise PermissionDenied(
            f"this needs a key with the scope {scope}, and yours has {held}; "
            f"use one made with: celeriac keys create --scope {scope}"
        )
    state.tenant_id, state.key_id = identity.tenant_id, identity.key_id
    state.scopes, state.is_admin = identity.scopes, Scope.ADMIN in identity.scopes
    key_id_context.set(state.key_id)
    is_limited_context.set(identity.limits.is_limited)
    stream_limits_context.set((identity.key_id, identity.limits))
    state.revocation = credential.revocation
    current_tenant.set(state.tenant_id)


def credential_in_headers(services: Services, connection: HTTPConnection) -> Credential:
    authorization, authenticator = _authorization_of(connection.scope), services.authenticator
    return Credential(
        partial(authenticator.identify, authorization), partial(authenticator.revocation_of, authorization)
    )


async def take_start(scope: AsgiScope) -> None:
    """Returns when it is the request's turn to begin, by whose key it seems to have. Raises ClientDisconnect if its
    client has gone meanwhile, and ServerOverloaded if too many wait."""
    services = getattr(scope["app"].state, "services", None)
    if services is None or scope["path"] in UNHELD_PATHS:
        return
    line = services.authenticator.line_of(_authorization_of(scope), _token_of(scope))
    gone = scope.get("extensions", {}).get(GONE)
    await services.starts.take(line, *(() if gone is None else (gone["is"],)))


def _token_of(scope: AsgiScope) -> str | None:
    query: bytes = scope["query_string"]
    return dict(parse_qsl(query.decode("latin-1"))).get("token") if b"token=" in query else None


def _authorization_of(scope: AsgiScope) -> str | None:
    """Older clients of Anthropic's send the key in a header of its own."""
    if authorization := header_of(scope, b"authorization"):
        return authorization
    key = header_of(scope, b"x-api-key")
    return None if key is None else f"Bearer {key}"


def caller_of(request: Request) -> Caller:
    """The services and the tenant of a request to a private route."""
    return Caller(services_of(request), request.state.tenant_id)


def services_of(request: Request) -> Services:
    services = request.app.state.services
    assert isinstance(services, Services)
    return services
