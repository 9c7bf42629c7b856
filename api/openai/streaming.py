"""A streamed answer: the endpoint's objects as nameless events without ids, and an end that nobody can mistake.

The SDKs take every blank line behind an `id:` for an event, and every named event for a chunk, so there are neither;
and what just closes looks finished to them, so whatever ends early says so in an error frame.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from typing import Protocol

from api.errors import error_body
from api.job_events import retry_until_storage_answers
from api.openai.running import Run, first_unserved, headers_of, refuse_unfinished
from api.sse import EventStream, data_frame
from domain.chunks import TokenChunk
from domain.errors import CeleriacError, JobNotFound, ServerOverloaded
from domain.ids import external_id
from domain.jobs import JobStatus
from storage import job_queries
from storage.job_queries import JobRecord

DONE = b"data: [DONE]\n\n"

Finish = Callable[[Sequence[JobRecord]], Iterable[Mapping[str, object]]]


class Translator(Protocol):
    """A job's stream in the words of one endpoint. Stateful: made for one stream, and fed every chunk in order."""

    def begin(self) -> Iterable[Mapping[str, object]]:
        """Once the job runs."""

    def from_chunk(self, chunk: TokenChunk) -> Iterable[Mapping[str, object]]: ...

    def finish(self, record: JobRecord) -> Iterable[Mapping[str, object]]:
        """Of a completed job."""


def stream_answer(run: Run, translator: Translator, *, last_frame: bytes = DONE) -> EventStream:
    return stream_answers([run], [translator], lambda records: translator.finish(records[0]), last_frame=last_frame)


def stream_answers(
    runs: Sequence[Run], translators: Sequence[Translator], finish: Finish, *, last_frame: bytes = DONE
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
        return error_frame(await first_unserved(runs))

    return EventStream(
        _frames(runs, translators, finish, last_frame),
        heartbeat_seconds=services.settings.stream_heartbeat_seconds,
        lifetime_seconds=services.settings.stream_lifetime_seconds,
        slots=services.slots,
        draining=services.draining,
        headers=headers_of(runs),
        early_end_frame=_early_end_frame(runs[0]),
        on_end=on_end,
        unserved=unserved,
    )


def error_frame(exc: CeleriacError) -> bytes:
    return data_frame(error_body(exc.code, exc.message, exc.param))


async def _frames(
    runs: Sequence[Run], translators: Sequence[Translator], finish: Finish, last_frame: bytes
) -> AsyncGenerator[bytes, None]:
    streams = [_translated(run, translator) for run, translator in zip(runs, translators, strict=True)]
    try:
        async with aclosing(streams[0] if len(streams) == 1 else _merged(streams)) as datas:
            async for data in datas:
                yield data_frame(data)
        records = [await _last_look(run) for run in runs]
        for data in finish(records):
            yield data_frame(data)
        if last_frame:
            yield last_frame
    except CeleriacError as exc:
        yield error_frame(exc)


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


def _early_end_frame(run: Run) -> bytes:
    name = external_id(run.job_id)
    return error_frame(ServerOverloaded(f"this stream ends here, but {name} goes on: see /v1/jobs/{name}/events"))
