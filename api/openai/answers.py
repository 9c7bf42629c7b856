"""The answers of the OpenAI routes: a complete response, or a stream of events.

Stream events have neither a name nor an id: the SDKs take each blank line after an `id:` for an event, and each named
event for a chunk. They also take a stream that just closes for a complete one, so a stream that ends early sends an
error event first. A complete response has the status of an error as long as no byte of it was sent.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Protocol

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from api.errors import error_body, error_response
from api.events import (
    next_of,
    retry_until_storage_answers,
)
from api.limits import size_of
from api.middleware import CUT
from api.openai.running import Run, first_unserved, headers_of
from api.sse import (
    ABANDONED,
    HEARTBEAT,
    EventStream,
    data_frame,
    wait_for_disconnect,
    wait_for_revocation,
)
from dialects.errors import refuse_unfinished
from domain.errors import AuthenticationFailed, CeleriacError, DeadlineExceeded, JobNotFound, ServerOverloaded
from domain.jobs import JobStatus, external_id
from domain.requests import TokenChunk
from storage import job_queries
from storage.job_queries import JobRecord

log = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"

Finish = Callable[[Sequence[JobRecord]], Iterable[Mapping[str, object]]]


class Translator(Protocol):
    """Translates the chunks of one job to the events of one endpoint. Stateful: one per stream, given every chunk in
    order."""

    def begin(self) -> Iterable[Mapping[str, object]]:
        """The events to send when the job starts to run."""

    def from_chunk(self, chunk: TokenChunk) -> Iterable[Mapping[str, object]]: ...

    def finish(self, record: JobRecord) -> Iterable[Mapping[str, object]]:
        """The events to send when the job is completed."""


@dataclass(frozen=True, slots=True)
class Framing:
    """How the objects of an endpoint travel. Behind the last of them comes `last_frame`."""

    frame_of: Callable[[Mapping[str, object]], bytes] = data_frame
    last_frame: bytes = DONE
    heartbeat: bytes = HEARTBEAT

    def error_frame_of(self, exc: CeleriacError) -> bytes:
        return self.frame_of(error_body(exc.code, exc.message, exc.param))


OPENAI_FRAMING = Framing()


def stream_answer(run: Run, translator: Translator, framing: Framing = OPENAI_FRAMING) -> EventStream:
    return stream_answers([run], [translator], lambda records: translator.finish(records[0]), framing)


def stream_answers(
    runs: Sequence[Run], translators: Sequence[Translator], finish: Finish, framing: Framing = OPENAI_FRAMING
) -> EventStream:
    """The streams of several jobs merged into one; `finish` returns the last events once all jobs are completed."""
    services = runs[0].services

    def on_end(reason: str) -> None:
        for run in runs:
            if reason == "complete":
                run.note_delivered()
            elif reason in ABANDONED:
                run.note_disconnected()

    async def unserved() -> bytes:
        return framing.error_frame_of(await first_unserved(runs))

    return EventStream(
        _frames(runs, translators, finish, framing),
        heartbeat_seconds=services.settings.stream_heartbeat_seconds,
        lifetime_seconds=services.settings.stream_lifetime_seconds,
        slots=services.slots,
        draining=services.last_call,
        headers=headers_of(runs),
        early_end_frame=framing.error_frame_of(_early_end(runs[0])),
        revoked_frame=framing.error_frame_of(_revoked()),
        heartbeat=framing.heartbeat,
        on_end=on_end,
        unserved=unserved,
    )


async def _frames(
    runs: Sequence[Run], translators: Sequence[Translator], finish: Finish, framing: Framing
) -> AsyncGenerator[bytes, None]:
    streams = [_translated(run, translator) for run, translator in zip(runs, translators, strict=True)]
    try:
        async with aclosing(streams[0] if len(streams) == 1 else _merged(streams)) as datas:
            async for data in datas:
                yield framing.frame_of(data)
        records = [await _completed(run) for run in runs]
        for data in finish(records):
            yield framing.frame_of(data)
        if framing.last_frame:
            yield framing.last_frame
    except CeleriacError as exc:
        yield framing.error_frame_of(exc)


async def _translated(run: Run, translator: Translator) -> AsyncGenerator[Mapping[str, object], None]:
    """Ends when the job is completed; otherwise raises the CeleriacError that says why it is not."""
    is_begun = has_text = False
    async with aclosing(run.services.streams.read(run.job_id)) as events:
        async for event in events:
            if not is_begun and (isinstance(event, TokenChunk) or event.status is not JobStatus.QUEUED):
                is_begun = True
                for data in translator.begin():
                    yield data
            if isinstance(event, TokenChunk) and event.is_reset:
                refuse_reset(run, has_text=has_text)
            elif isinstance(event, TokenChunk):
                has_text = True
                for data in translator.from_chunk(event):
                    yield data
    await _completed(run)


def refuse_reset(run: Run, *, has_text: bool) -> None:
    """Handle a job that starts over: these streams cannot retract text, so raises ServerOverloaded if any was sent."""
    if has_text:
        run.note_disconnected()
        raise ServerOverloaded(
            f"the model was replaced while {external_id(run.job_id)} ran, so its answer starts over: discard what you "
            "received, and repeat the request to get the new answer"
        )


async def _merged(
    streams: Sequence[AsyncGenerator[Mapping[str, object], None]],
) -> AsyncGenerator[Mapping[str, object], None]:
    """Yields from all streams, in the order of arrival. An exception in one ends all of them."""
    following = {asyncio.ensure_future(next_of(stream)): stream for stream in streams}
    try:
        while following:
            done, _ = await asyncio.wait(following, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                stream = following.pop(task)
                try:
                    data = task.result()
                except StopAsyncIteration:
                    continue
                yield data
                following[asyncio.ensure_future(next_of(stream))] = stream
    finally:
        for task in following:
            task.cancel()
        await asyncio.gather(*following, return_exceptions=True)
        for stream in streams:
            await stream.aclose()


async def _completed(run: Run) -> JobRecord:
    """The job, read again. Raises the CeleriacError that says why it is not completed."""
    record = await retry_until_storage_answers(lambda: run.services.read(job_queries.get, run.job_id, run.tenant_id))
    if record is None:
        raise JobNotFound(f"{external_id(run.job_id)} was deleted")
    refuse_unfinished(record)
    return record


def _early_end(run: Run) -> CeleriacError:
    name = external_id(run.job_id)
    return ServerOverloaded(f"this stream ends early, but {name} continues: read /v1/jobs/{name}/events")


def _revoked() -> CeleriacError:
    return AuthenticationFailed("this API key was revoked or expired during the request; its job goes on")


KEEP_ALIVE = b"\n"  # JSON allows whitespace before a value

Render = Callable[[Sequence[JobRecord]], Mapping[str, object]]

Refuse = Callable[[JobRecord], None]  # raises the CeleriacError that says why a job has no answer


class WholeAnswer(Response):
    """Waits until all `runs` have ended, then sends the JSON object that `render` makes of their jobs.

    Nothing is sent at first, so that a job that fails early can still be answered with the status of its error. If the
    client has sent its read timeout, that holds to the end. For other clients, a longer wait is kept alive: a status
    200 is sent, then line breaks, which every JSON parser skips. If there is then no answer in the end, the connection
    is closed in the middle of the body, since no client looks for an error in a 200. A retry gets the error's status.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        render: Render,
        *,
        refuse: Refuse = refuse_unfinished,
        timeout_seconds: float | None = None,
        needs_token_ids: bool = False,
    ) -> None:
        """`refuse` raises for jobs that have no answer; `render` gets the others, with their token ids if it needs
        them. After `timeout_seconds` the answer is an error; the jobs must have a deadline of their own."""
        # Not super().__init__(), as neither the body nor the status is known yet.
        self.background = None
        self._runs = runs
        self._render = render
        self._refuse = refuse
        self._services = runs[0].services
        self._is_begun = False
        self._timeout_seconds = timeout_seconds
        self._needs_token_ids = needs_token_ids

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if any(run.record is None for run in self._runs):
            await self._wait_and_answer(scope, receive, send)
            return
        await self._send_answer(await self._whole_answer(), send)
        self._note_delivered()

    async def _wait_and_answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = asyncio.create_task(wait_for_disconnect(receive))
        drained = asyncio.create_task(self._services.last_call.wait())
        ended = asyncio.create_task(self._wait_for_all())
        late = asyncio.create_task(self._wait_for_timeout())
        unserved = asyncio.create_task(first_unserved(self._runs))
        revoked = asyncio.create_task(wait_for_revocation(scope))
        tasks = (ended, gone, drained, late, unserved, revoked)
        try:
            with self._services.slots.hold():
                while not any(task.done() for task in tasks):
                    await self._wait_a_while(tasks, send)
            if not ended.done() and (gone.done() or unserved.done()):
                for run in self._runs:
                    run.note_disconnected()
            if gone.done() and not ended.done():
                return
            if ended.done():
                answer = await self._whole_answer_after(ended)
            elif revoked.done():
                answer = error_response(_revoked())
            elif unserved.done():
                answer = error_response(unserved.result())
            elif late.done():
                answer = error_response(self._late())
            else:
                answer = error_response(self._restarted())
            if self._is_begun and answer.status_code >= 400:
                await self._cut(scope, gone, answer)
                return
            await self._send_answer(answer, send)
            if not gone.done() and ended.done():
                self._note_delivered()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    def _note_delivered(self) -> None:
        for run in self._runs:
            run.note_delivered()

    async def _wait_for_all(self) -> None:
        await asyncio.gather(*(self._services.read_to_end(run.job_id) for run in self._runs))

    async def _wait_for_timeout(self) -> None:
        if self._timeout_seconds is None:
            await asyncio.Event().wait()  # never returns
        else:
            await asyncio.sleep(self._timeout_seconds)

    async def _wait_a_while(self, tasks: Sequence["asyncio.Task[object]"], send: Send) -> None:
        timeout = self._services.settings.stream_heartbeat_seconds if self._runs[0].has_keep_alive else None
        done, _ = await asyncio.wait(tasks, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if done:
            return
        if not self._is_begun:
            self._is_begun = True
            await _send_head(send, 200, _raw(self._head()))
        await send({"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True})

    async def _whole_answer_after(self, ended: "asyncio.Task[None]") -> Response:
        try:
            ended.result()
        except CeleriacError as exc:
            return error_response(exc)
        return await self._whole_answer()

    async def _whole_answer(self) -> Response:
        """The answer or the error, as if nothing had been sent yet."""
        try:
            records = [await self._read(run) for run in self._runs]
            for record in records:
                self._refuse(record)
            num_bytes = sum(size_of(record.result) for record in records)
            return Response(await self._services.large_work.run(num_bytes, self._rendered, records))
        except CeleriacError as exc:
            return error_response(exc)

    async def _read(self, run: Run) -> JobRecord:
        record = run.record or await run.read(with_request=True)
        return replace(record, token_ids=await run.read_token_ids()) if self._needs_token_ids else record

    def _rendered(self, records: Sequence[JobRecord]) -> bytes:
        return orjson.dumps(self._render(records))

    def _late(self) -> CeleriacError:
        return DeadlineExceeded(f"{self._name} was not done within {self._timeout_seconds:g} s, so it was stopped")

    def _restarted(self) -> CeleriacError:
        return ServerOverloaded(
            f"this server is restarting, but {self._name} continues: repeat the request to get its answer"
        )

    async def _cut(self, scope: Scope, gone: "asyncio.Task[None]", answer: Response) -> None:
        """Close the connection before the end of the body: the client raises, as for any broken connection."""
        log.info(
            "closed a connection kept alive for an answer that failed",
            extra={"job_id": self._name, "status": answer.status_code},
        )
        scope["extensions"][CUT]["close"]()
        await gone

    @property
    def _name(self) -> str:
        return external_id(self._runs[0].job_id)

    def _head(self) -> dict[str, str]:
        return {"content-type": "application/json"} | headers_of(self._runs)

    async def _send_answer(self, answer: Response, send: Send) -> None:
        if not self._is_begun:
            headers = dict(answer.raw_headers) | _raw(self._head())
            await _send_head(send, answer.status_code, headers)
        await send({"type": "http.response.body", "body": answer.body, "more_body": False})


def _raw(headers: Mapping[str, str]) -> dict[bytes, bytes]:
    return {name.encode("latin-1"): value.encode("latin-1") for name, value in headers.items()}


async def _send_head(send: Send, status: int, headers: Mapping[bytes, bytes]) -> None:
    await send({"type": "http.response.start", "status": status, "headers": list(headers.items())})
