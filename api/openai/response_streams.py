"""The events of a response, as server-sent events or on a WebSocket.

A response's events are numbered from 0 and are the same whenever they are read: the numbers are derived from the job's
committed chunks. So a cursor stays valid for as long as the job is kept, whichever API process serves it and however
many workers the job has had.
"""

from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import aclosing

from api.events import (
    retry_until_storage_answers,
)
from api.services import Services
from api.sse import (
    frame,
)
from dialects.openai_response_objects import (
    Ending,
    ResponseView,
    ending_of,
    response_object,
)
from dialects.openai_response_output import ResponseEvent, ResponseOutput
from dialects.openai_response_requests import ResponseBody
from domain.errors import CeleriacError, JobNotFound, ServerOverloaded
from domain.jobs import external_id
from domain.requests import TokenChunk
from storage import job_queries
from storage.job_queries import JobRecord
from text.outputs import OutputParser

LAST_EVENTS = {"completed": "response.completed", "incomplete": "response.incomplete"}


class ResponseStream:
    """The encoded events of one response for one reader. The caller has checked that the job belongs to the reader."""

    def __init__(
        self, services: Services, record: JobRecord, body: ResponseBody, parser: OutputParser, *, starting_after: int
    ) -> None:
        """`record` must include its request. `starting_after` is the number of the last event that the reader has, or
        -1 for none."""
        self._services = services
        self._record = record
        self._body = body
        self._output = ResponseOutput(record.job.id, parser)
        self._starting_after = starting_after
        self._number = -1  # of the last event, sent or skipped

    async def frames(self) -> AsyncGenerator[bytes, None]:
        """The events as server-sent events."""
        async with aclosing(self.events()) as events:
            async for event in events:
                yield frame(str(event["type"]), event)

    async def events(self) -> AsyncGenerator[ResponseEvent, None]:
        """The events after `starting_after`, each with its number; an error, which ends them, has none."""
        for event in self._numbered(self._beginning()):
            yield event
        has_begun = has_text = False
        try:
            async with aclosing(self._services.streams.read(self._record.job.id)) as pieces:
                async for piece in pieces:
                    if not has_begun and (isinstance(piece, TokenChunk) or piece.attempt > 0):
                        has_begun = True
                        for event in self._numbered(self._start()):
                            yield event
                    if isinstance(piece, TokenChunk) and piece.is_reset and (has_text or self._starting_after >= 0):
                        raise _started_over(self._record)
                    if isinstance(piece, TokenChunk) and not piece.is_reset:
                        has_text = True
                        for event in self._numbered(self._output.push(piece.text, piece.logprobs)):
                            yield event
            for event in self._numbered(await self._end()):
                yield event
        except CeleriacError as exc:
            yield error_event(exc)

    def _beginning(self) -> Iterator[ResponseEvent]:
        """Only a background response is ever shown as queued; others are in progress from the start."""
        begun = self._response(Ending("queued" if self._body.background else "in_progress"))
        yield {"type": "response.created", "response": begun}
        yield {"type": f"response.{begun['status']}", "response": begun}

    def _start(self) -> Iterator[ResponseEvent]:
        if self._body.background:
            yield {"type": "response.in_progress", "response": self._response(Ending("in_progress"))}

    async def _end(self) -> list[ResponseEvent]:
        job = self._record.job
        record = await retry_until_storage_answers(
            lambda: self._services.read(job_queries.get, job.id, job.tenant_id, with_request=True)
        )
        if record is None:
            raise JobNotFound(f"{external_id(job.id, 'resp')} was deleted")
        self._record = record
        ending = ending_of(record.job)
        events = list(self._output.finish(ending.item_status))
        kind = LAST_EVENTS.get(ending.status, "response.failed")
        return [*events, {"type": kind, "response": self._response(ending)}]

    def _response(self, ending: Ending) -> ResponseView:
        return response_object(self._record, self._body, ending, self._output)

    def _numbered(self, events: Iterable[ResponseEvent]) -> Iterator[ResponseEvent]:
        for event in events:
            self._number += 1
            if self._number > self._starting_after:
                yield {**event, "sequence_number": self._number}

    @property
    def early_end(self) -> ResponseEvent:
        """The event to send if this server ends the stream before the job is done."""
        name = external_id(self._record.job.id, "resp")
        return error_event(ServerOverloaded(f"this stream ends early, but {name} continues: retrieve it"))


def _started_over(record: JobRecord) -> CeleriacError:
    """For a job that starts over: events that were numbered and sent cannot be retracted."""
    name = external_id(record.job.id, "resp")
    return ServerOverloaded(
        f"the model was replaced while {name} ran, so its output starts over: discard what you received, and retrieve "
        f"{name} without starting_after"
    )


def error_event(exc: CeleriacError) -> ResponseEvent:
    return {"type": "error", "code": exc.code, "message": exc.message, "param": exc.param}
