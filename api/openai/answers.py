"""How the OpenAI routes answer: whole, or as a stream of events.

A streamed answer: the endpoint's objects as nameless events without ids, and an end that nobody can mistake.

The SDKs take every blank line behind an `id:` for an event, and every named event for a chunk, so there are neither;
and what just closes looks finished to them, so whatever ends early says so in an error frame.

A whole answer, for which the client waits: an error with its own status while that is still possible.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from api.errors import error_body, error_response
from api.events import (
    HEARTBEAT,
    EventStream,
    data_frame,
    retry_until_storage_answers,
    wait_for_disconnect,
    wait_for_revocation,
)
from api.limits import size_of
from api.middleware import CUT
from api.openai.running import Run, first_unserved, headers_of
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
    """A job's stream in the words of one endpoint. Stateful: made for one stream, and fed every chunk in order."""

    def begin(self) -> Iterable[Mapping[str, object]]:
        """Once the job runs."""

    def from_chunk(self, chunk: TokenChunk) -> Iterable[Mapping[str, object]]: ...

    def finish(self, record: JobRecord) -> Iterable[Mapping[str, object]]:
        """Of a completed job."""


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
    """The streams of several jobs as one, as they come; `finish` says the last words when all are completed."""
    services = runs[0].services

    def on_end(reason: str) -> None:
        for run in runs:
            if reason == "complete":
                run.note_delivered()
            elif reason in ("disconnected", "slow", "unserved"):
                run.note_disconnected()

    async def unserved() -> bytes:
        return framing.error_frame_of(await first_unserved(runs))

    return EventStream(
        _frames(runs, translators, finish, framing),
        heartbeat_seconds=services.settings.stream_heartbeat_seconds,
        lifetime_seconds=services.settings.stream_lifetime_seconds,
        slots=services.slots,
        draining=services.draining,
        headers=headers_of(runs),
        early_end_frame=framing.error_frame_of(_early_end(runs[0])),
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
        records = [await _last_look(run) for run in runs]
        for data in finish(records):
            yield framing.frame_of(data)
        if framing.last_frame:
            yield framing.last_frame
    except CeleriacError as exc:
        yield framing.error_frame_of(exc)


async def _translated(run: Run, translator: Translator) -> AsyncGenerator[Mapping[str, object], None]:
    """Ends with the job. Raises the CeleriacError that says why it is not completed."""
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
    await _last_look(run)


def refuse_reset(run: Run, *, has_text: bool) -> None:
    """These streams cannot take back what was sent. Raises ServerOverloaded where there is something to take back."""
    if has_text:
        run.note_disconnected()
        raise ServerOverloaded(
            f"the model was replaced while {external_id(run.job_id)} ran, and its answer begins anew: discard what was "
            "sent, and send the request again to get the new one"
        )


async def _merged(
    streams: Sequence[AsyncGenerator[Mapping[str, object], None]],
) -> AsyncGenerator[Mapping[str, object], None]:
    """Whatever comes first. One that fails ends all."""
    following = {asyncio.ensure_future(_next_of(stream)): stream for stream in streams}
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
                following[asyncio.ensure_future(_next_of(stream))] = stream
    finally:
        for task in following:
            task.cancel()
        await asyncio.gather(*following, return_exceptions=True)
        for stream in streams:
            await stream.aclose()


async def _next_of(stream: AsyncGenerator[Mapping[str, object], None]) -> Mapping[str, object]:
    return await anext(stream)


async def _last_look(run: Run) -> JobRecord:
    """The completed job. Raises the CeleriacError that says why it is not."""
    record = await retry_until_storage_answers(lambda: run.services.read(job_queries.get, run.job_id, run.tenant_id))
    if record is None:
        raise JobNotFound(f"{external_id(run.job_id)} was deleted")
    refuse_unfinished(record)
    return record


def _early_end(run: Run) -> CeleriacError:
    name = external_id(run.job_id)
    return ServerOverloaded(f"this stream ends here, but {name} goes on: see /v1/jobs/{name}/events")


KEEP_ALIVE = b"\n"  # JSON may have blanks before it

Render = Callable[[Sequence[JobRecord]], Mapping[str, object]]

Refuse = Callable[[JobRecord], None]  # raises the CeleriacError that says why a terminal job has no answer


class WholeAnswer(Response):
    """Waits for the end of all `runs` and sends what `render` makes of them.

    Nothing is sent at first, so that a job that fails soon does so with its own status. A client that tells its read
    timeout waits like that to the end. For others a wait that is longer is kept alive with line breaks, which any JSON
    parser skips, behind a status 200: where there is no answer in the end, the connection is cut, since no client looks
    for an error in a 200. Their retry is told the reason, with its status.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        render: Render,
        *,
        refuse: Refuse = refuse_unfinished,
        timeout_seconds: float | None = None,
    ) -> None:
        """`render` gets what `refuse` lets pass. Past `timeout_seconds` the answer is an error; the jobs have a
        deadline of their own."""
        # Not super().__init__(), as there is neither body nor status yet.
        self.background = None
        self._runs = runs
        self._render = render
        self._refuse = refuse
        self._services = runs[0].services
        self._is_begun = False
        self._timeout_seconds = timeout_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = asyncio.create_task(wait_for_disconnect(receive))
        drained = asyncio.create_task(self._services.draining.wait())
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
                answer = await self._whole_answer(ended)
            elif revoked.done():
                answer = error_response(AuthenticationFailed("this API key was revoked while its answer was awaited"))
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
                for run in self._runs:
                    run.note_delivered()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def _wait_for_all(self) -> None:
        await asyncio.gather(*(self._services.read_to_end(run.job_id) for run in self._runs))

    async def _wait_for_timeout(self) -> None:
        if self._timeout_seconds is None:
            await asyncio.Event().wait()  # for ever
        else:
            await asyncio.sleep(self._timeout_seconds)

    async def _wait_a_while(self, tasks: Sequence["asyncio.Task[object]"], send: Send) -> None:
        timeout = self._services.settings.stream_heartbeat_seconds if self._runs[0].has_keep_alive else None
        done, _ = await asyncio.wait(tasks, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if done:
            return
        if not self._is_begun:
            self._is_begun = True
            await _send_head(send, 200, self._head())
        await send({"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True})

    async def _whole_answer(self, ended: "asyncio.Task[None]") -> Response:
        """What there is to say, as if nothing had been sent yet."""
        try:
            ended.result()
            records = [await run.read(with_request=True) for run in self._runs]
            for record in records:
                self._refuse(record)
            num_bytes = sum(size_of(record.result) for record in records)
            return Response(await self._services.large_work.run(num_bytes, self._rendered, records))
        except CeleriacError as exc:
            return error_response(exc)

    def _rendered(self, records: Sequence[JobRecord]) -> bytes:
        return orjson.dumps(self._render(records))

    def _late(self) -> CeleriacError:
        return DeadlineExceeded(f"{self._name} was not done within {self._timeout_seconds:g} s and is stopped")

    def _restarted(self) -> CeleriacError:
        return ServerOverloaded(f"this server is being restarted; {self._name} goes on: ask again for its answer")

    async def _cut(self, scope: Scope, gone: "asyncio.Task[None]", answer: Response) -> None:
        """End the connection without the end of the body: the client raises, as for any connection that breaks."""
        log.info(
            "cut a kept-alive answer that came to nothing",
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
            headers = dict(answer.headers) | self._head()
            await _send_head(send, answer.status_code, headers)
        await send({"type": "http.response.body", "body": answer.body, "more_body": False})


async def _send_head(send: Send, status: int, headers: Mapping[str, str]) -> None:
    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
