"""Responses over a WebSocket: `response.create` messages in, the events of responses out.

The protocol is OpenAI's WebSocket mode (developers.openai.com/api/docs/guides/websocket-mode).

Each `response.create` is a request to POST /v1/responses and makes one job, whose events are those of its stream. What
is true of a stream is true here: a connection that breaks does not take a stored response with it, which is then read
by GET /v1/responses/{id}?stream=true. Messages with the same `stream_id`, or without one, are answered one after
another; different ones are answered at the same time.
"""

import asyncio
import logging
import secrets
from collections import deque
from collections.abc import Mapping
from contextlib import aclosing, suppress
from typing import Annotated, Any, Literal
from uuid import UUID

import orjson
from starlette.requests import Request
from starlette.routing import WebSocketRoute
from starlette.types import Message
from starlette.websockets import WebSocket, WebSocketDisconnect

from api.errors import error_response
from api.openai.response_records import parser_for
from api.openai.response_streams import ResponseStream
from api.openai.responses import start_response
from api.services import Services, authenticate, credential_in_headers
from api.sse import (
    ABANDONED,
    SEND_TIMEOUT_SECONDS,
    wait_for_revocation,
)
from dialects.bodies import parse_model
from dialects.errors import HTTP_BY_CODE
from dialects.fields import HINT_TREE
from dialects.openai import only
from dialects.openai_response_items import ItemId
from dialects.openai_response_requests import ResponseBody
from domain.access import Scope
from domain.errors import AuthenticationFailed, CeleriacError, ConnectionTooOld, InvalidRequest, ServerOverloaded
from metrics import stream_ends_total
from observability import request_id_context

log = logging.getLogger(__name__)

MAX_LANES = 16  # different values of stream_id per connection, and so its responses at the same time

MAX_WAITING = 32  # messages per connection that have not been answered yet

MAX_REMEMBERED = 32  # responses with store=false per connection that the next ones can continue

TRY_AGAIN, RESTART, POLICY = 1013, 1012, 1008  # RFC 6455 and its registry of close codes

#: Headers of the connection that are about one request, not about each of its messages.
OF_ONE_REQUEST = (b"idempotency-key", b"x-stainless-retry-count", b"content-length", b"content-type")


class CreateMessage(ResponseBody):
    """`stream` may be given, but has no effect."""

    type: Literal["response.create"]
    stream_id: ItemId | None = None
    background: Annotated[bool, only(False)] | None = None
    generate: Annotated[bool, only(True)] | None = None


def error_message(exc: CeleriacError, stream_id: str | None = None) -> dict[str, Any]:
    """An error as a message, in the form of the SDK's ResponseWsError."""
    http = HTTP_BY_CODE[exc.code]
    error = {"type": http.type, "code": exc.code, "message": exc.message, "param": exc.param}
    return _on_lane({"type": "error", "status": http.status, "error": error}, stream_id)


def _on_lane(event: Mapping[str, Any], stream_id: str | None) -> dict[str, Any]:
    return {**event} if stream_id is None else {**event, "stream_id": stream_id}


class ResponseSocket:
    """One open connection."""

    def __init__(self, services: Services, websocket: WebSocket) -> None:
        self._services = services
        self._websocket = websocket
        self._waiting: dict[str | None, deque[tuple[CreateMessage, int]]] = {}  # by lane, with their sizes in bytes
        self._lanes: dict[str | None, asyncio.Task[None]] = {}
        self._passing: deque[UUID] = deque(maxlen=MAX_REMEMBERED)  # jobs of responses with store=false
        self._reason = "disconnected"  # why responses end early

    async def serve(self) -> None:
        """Until the client closes, its key is revoked, or the connection has had its time."""
        settings = self._services.settings
        reading = asyncio.create_task(self._read())
        revoked = asyncio.create_task(wait_for_revocation(self._websocket.scope))
        drained = asyncio.create_task(self._services.draining.wait())
        try:
            with self._services.slots.hold():
                await asyncio.wait(
                    (reading, revoked, drained),
                    timeout=settings.stream_lifetime_seconds,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                if drained.done() and not reading.done() and not revoked.done():
                    await self._finish(reading, revoked)
            if revoked.done():
                self._reason = "revoked"
                await self._close(POLICY, AuthenticationFailed("this API key was revoked"))
            elif not reading.done() and not drained.done():
                self._reason = "lifetime"
                await self._close(TRY_AGAIN, _too_old(settings.stream_lifetime_seconds))
            elif not reading.done():
                self._reason = "draining"
                await self._close(RESTART, _restarting())
        finally:
            tasks = (reading, revoked, drained, *self._lanes.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _finish(self, *ends: asyncio.Task[None]) -> None:
        """Responses that have begun come to their end, as on HTTP, unless that takes too long (docs/adr/0075)."""
        last_call = asyncio.create_task(self._services.last_call.wait())
        answered = asyncio.create_task(self._wait_for_lanes())
        await asyncio.wait((*ends, last_call, answered), return_when=asyncio.FIRST_COMPLETED)
        for task in (last_call, answered):
            task.cancel()
        await asyncio.gather(last_call, answered, return_exceptions=True)

    async def _wait_for_lanes(self) -> None:
        while lanes := [task for task in self._lanes.values() if not task.done()]:
            await asyncio.wait(lanes)

    async def _read(self) -> None:
        """Returns when the client has gone."""
        with suppress(WebSocketDisconnect):
            while True:
                message = await self._websocket.receive()
                if message["type"] == "websocket.disconnect":
                    return
                try:
                    await self._take(message)
                except CeleriacError as exc:
                    await self._tell(exc)

    async def _take(self, message: Message) -> None:
        """Raises CeleriacError."""
        if (text := message.get("text")) is None:
            raise InvalidRequest("the message is binary; send JSON as text")
        await self._services.starts.take(self._websocket.state.tenant_id)
        body = text.encode()
        default_model = self._services.catalog.default_id_for("generation")
        create = await self._services.large_work.run(
            len(body), parse_model, body, CreateMessage, HINT_TREE, default_model=default_model
        )
        lane = create.stream_id
        self._lanes = {name: task for name, task in self._lanes.items() if not task.done()}
        if lane not in self._lanes and len(self._lanes) >= MAX_LANES:
            raise InvalidRequest(
                f"stream_id is {lane!r}, but this connection has {MAX_LANES} already; use one of them, or another "
                "connection",
                param="stream_id",
            )
        sizes = [size for messages in self._waiting.values() for _, size in messages]
        if len(sizes) >= MAX_WAITING or (sizes and sum(sizes) + len(body) > self._services.settings.max_body_bytes):
            raise ServerOverloaded(
                f"{len(sizes)} messages of {sum(sizes)} bytes wait on this connection; send more when some are answered"
            )
        self._waiting.setdefault(lane, deque()).append((create, len(body)))
        if lane not in self._lanes:
            self._lanes[lane] = asyncio.create_task(self._answer_all(lane))

    async def _answer_all(self, lane: str | None) -> None:
        waiting = self._waiting[lane]
        while waiting:
            token = request_id_context.set(f"req_{secrets.token_hex(12)}")
            try:
                create, _ = waiting[0]
                await self._answer(create)
            except CeleriacError as exc:
                await self._tell(exc, lane)
            except Exception:  # outermost: the connection and its other lanes go on
                log.exception("a message on a WebSocket failed")
                await self._tell(CeleriacError("the server failed; report the time of this"), lane)
            finally:
                waiting.popleft()
                request_id_context.reset(token)
        # Nothing is awaited after the last look at what waits: a message that arrives now begins a new lane.
        del self._waiting[lane]

    async def _answer(self, create: CreateMessage) -> None:
        """Raises CeleriacError if there will be no response."""
        services, lane = self._services, create.stream_id
        if services.draining.is_set():
            raise _restarting()
        await _authenticate(services, self._websocket)  # its limits may have changed since the connection was opened
        services.slots.refuse_if_full()
        body = _body_of(create)
        run = await start_response(self._request(body), body, passing=self._passing)
        if not body.is_stored:
            self._passing.append(run.job_id)
        record = await run.read(with_request=True)
        stream = ResponseStream(services, record, body, parser_for(services, record), starting_after=-1)
        sending = asyncio.create_task(self._send_events(stream, lane))
        unserved = asyncio.create_task(run.wait_until_unserved())
        reason = None
        try:
            with services.slots.hold():
                await asyncio.wait((sending, unserved), return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                reason = sending.result()
            else:
                reason = "unserved"
                await self._tell(unserved.result(), lane)
        finally:
            for task in (sending, unserved):
                task.cancel()
            await asyncio.gather(sending, unserved, return_exceptions=True)
            reason = reason or ("draining" if services.draining.is_set() else self._reason)
            stream_ends_total.labels(reason).inc()
            if reason == "complete":
                run.note_delivered()
            elif reason in ABANDONED:
                run.note_disconnected()

    async def _send_events(self, stream: ResponseStream, lane: str | None) -> str | None:
        """Returns complete, or slow, or None if the connection has ended."""
        async with aclosing(stream.events()) as events:
            async for event in events:
                try:
                    if not await self._send(_as_message(event, lane)):
                        return None
                except TimeoutError:
                    return "slow"
        return "complete"

    async def _send(self, message: Mapping[str, Any]) -> bool:
        """False if the connection has ended. Raises TimeoutError if the client reads too slowly."""
        try:
            async with asyncio.timeout(SEND_TIMEOUT_SECONDS):
                await self._websocket.send_text(orjson.dumps(message).decode())
        except (WebSocketDisconnect, RuntimeError):
            return False
        return True

    async def _tell(self, exc: CeleriacError, lane: str | None = None) -> None:
        """To a client that does not read, pings will put an end."""
        with suppress(TimeoutError):
            await self._send(error_message(exc, lane))

    async def _close(self, code: int, exc: CeleriacError) -> None:
        with suppress(WebSocketDisconnect, RuntimeError, TimeoutError):
            await self._tell(exc)
            await self._websocket.close(code, exc.message)

    def _request(self, body: ResponseBody) -> Request:
        """The message as a request to POST /v1/responses."""
        scope = self._websocket.scope
        headers = [(name, value) for name, value in scope["headers"] if name not in OF_ONE_REQUEST]
        content = body.model_dump_json(by_alias=True, exclude_unset=True).encode()

        async def receive() -> Message:
            return {"type": "http.request", "body": content, "more_body": False}

        return Request({**scope, "type": "http", "method": "POST", "headers": headers}, receive)


def _body_of(create: CreateMessage) -> ResponseBody:
    given = create.model_dump(by_alias=True, exclude_unset=True, exclude={"type", "stream_id", "generate"})
    return ResponseBody.model_validate(given | {"stream": True})


def _as_message(event: Mapping[str, Any], lane: str | None) -> dict[str, Any]:
    """An event of a stream, whose errors have another form here."""
    if event["type"] != "error":
        return _on_lane(event, lane)
    http = HTTP_BY_CODE[event["code"]]
    error = {"type": http.type, "code": event["code"], "message": event["message"], "param": event["param"]}
    return _on_lane({"type": "error", "status": http.status, "error": error}, lane)


def _restarting() -> CeleriacError:
    return ServerOverloaded("this server is restarting; connect again")


def _too_old(seconds: float) -> CeleriacError:
    return ConnectionTooOld(f"this connection has been open for {seconds:.0f} s; open another one to continue")


async def _authenticate(services: Services, websocket: WebSocket) -> None:
    """Raises AuthenticationFailed, PermissionDenied or StorageUnavailable."""
    await authenticate(websocket, credential_in_headers(services, websocket), Scope.SUBMIT)


async def serve_socket(websocket: WebSocket) -> None:
    services: Services = websocket.app.state.services
    try:
        await _authenticate(services, websocket)
        services.slots.refuse_if_below(
            2, what="a WebSocket with a response on it", remedy="send it to POST /v1/responses"
        )
        services.slots.refuse_if_full()
    except CeleriacError as exc:
        await websocket.send_denial_response(error_response(exc))
        return
    await websocket.accept()
    await ResponseSocket(services, websocket).serve()


route = WebSocketRoute("/v1/responses", serve_socket)
