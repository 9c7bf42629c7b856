"""A streamed answer: the endpoint's objects as nameless events without ids, and an end that nobody can mistake.

The SDKs take every blank line behind an `id:` for an event, and every named event for a chunk, so there are neither;
and what just closes looks finished to them, so whatever ends early says so in an error frame.
"""

from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import aclosing
from typing import Protocol

from api.errors import error_body
from api.job_events import when_storage_answers
from api.openai.running import Run, refuse_unfinished
from api.sse import EventStream, data_frame
from domain.chunks import TokenChunk
from domain.errors import CeleriacError, JobNotFound, ServerOverloaded
from domain.ids import external_id
from domain.jobs import JobStatus
from storage import job_queries
from storage.job_queries import JobRecord

DONE = b"data: [DONE]\n\n"


class Translator(Protocol):
    """A job's stream in the words of one endpoint. Stateful: made for one stream, and fed every chunk in order."""

    def begin(self) -> Iterable[Mapping[str, object]]:
        """Once the job runs."""

    def from_chunk(self, chunk: TokenChunk) -> Iterable[Mapping[str, object]]: ...

    def finish(self, record: JobRecord) -> Iterable[Mapping[str, object]]:
        """Of a completed job."""


def stream_answer(run: Run, translator: Translator) -> EventStream:
    services = run.services

    def on_end(reason: str) -> None:
        if reason == "complete":
            run.note_delivered()
        elif reason in ("disconnected", "slow"):
            run.note_disconnected()

    return EventStream(
        _frames(run, translator),
        heartbeat_seconds=services.settings.stream_heartbeat_seconds,
        lifetime_seconds=services.settings.stream_lifetime_seconds,
        slots=services.slots,
        draining=services.draining,
        headers=run.headers,
        farewell=_farewell(run),
        on_end=on_end,
    )


def error_frame(exc: CeleriacError) -> bytes:
    return data_frame(error_body(exc.code, exc.message, exc.param))


async def _frames(run: Run, translator: Translator) -> AsyncGenerator[bytes, None]:
    is_begun = False
    async with aclosing(run.services.streams.read(run.job_id)) as events:
        async for event in events:
            if not is_begun and (isinstance(event, TokenChunk) or event.status is not JobStatus.QUEUED):
                is_begun = True
                for data in translator.begin():
                    yield data_frame(data)
            if isinstance(event, TokenChunk):
                for data in translator.from_chunk(event):
                    yield data_frame(data)
    try:
        record = await _last_look(run)
        for data in translator.finish(record):
            yield data_frame(data)
        yield DONE
    except CeleriacError as exc:
        yield error_frame(exc)


async def _last_look(run: Run) -> JobRecord:
    """The completed job. Raises the CeleriacError that says why it is not."""
    record = await when_storage_answers(lambda: run.services.read(job_queries.get, run.job_id, run.tenant_id))
    if record is None:
        raise JobNotFound(f"{external_id(run.job_id)} was deleted")
    refuse_unfinished(record)
    return record


def _farewell(run: Run) -> bytes:
    name = external_id(run.job_id)
    return error_frame(ServerOverloaded(f"this stream ends here, but {name} goes on: see /v1/jobs/{name}/events"))
