"""A response as it comes to be: named events, numbered from 0, the same ones whenever they are read.

The numbers follow from the chunks of the job, in the order in which they were committed, so a cursor holds for as long
as the job is kept, whoever serves it and however many workers the job has worn out.
"""

from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import aclosing
from typing import Any

from api.job_events import retry_until_storage_answers
from api.openai.output_parsing import OutputParser
from api.openai.response_objects import Ending, ending_of, response_object
from api.openai.response_output import ResponseEvent, ResponseOutput
from api.openai.response_schemas import ResponseBody
from api.services import Services
from api.sse import frame
from domain.chunks import TokenChunk
from domain.errors import CeleriacError, JobNotFound, ServerOverloaded
from domain.ids import external_id
from storage import job_queries
from storage.job_queries import JobRecord

LAST_EVENTS = {"completed": "response.completed", "incomplete": "response.incomplete"}


class ResponseStream:
    """The frames of one reader. Whoever makes one has checked that the job is the reader's own."""

    def __init__(
        self, services: Services, record: JobRecord, body: ResponseBody, parser: OutputParser, *, starting_after: int
    ) -> None:
        """`record` comes with its request. `starting_after`: the number of the last event that the reader has, or
        -1."""
        self._services = services
        self._record = record
        self._body = body
        self._output = ResponseOutput(record.job.id, parser)
        self._starting_after = starting_after
        self._number = -1  # of the last event, sent or skipped

    async def frames(self) -> AsyncGenerator[bytes, None]:
        for data in self._numbered(self._beginning()):
            yield data
        has_begun = has_text = False
        async with aclosing(self._services.streams.read(self._record.job.id)) as events:
            async for event in events:
                if not has_begun and (isinstance(event, TokenChunk) or event.attempt > 0):
                    has_begun = True
                    for data in self._numbered(self._start()):
                        yield data
                if isinstance(event, TokenChunk) and event.is_reset and (has_text or self._starting_after >= 0):
                    yield frame("error", error_event(_begun_anew(self._record)))
                    return
                if isinstance(event, TokenChunk) and not event.is_reset:
                    has_text = True
                    for data in self._numbered(self._output.push(event.text, event.logprobs)):
                        yield data
        for data in self._numbered(await self._end()):
            yield data

    def _beginning(self) -> Iterator[ResponseEvent]:
        """Who waits for a response is told that it has begun; only one in the background has a queue to show."""
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
            return [error_event(JobNotFound(f"{external_id(job.id, 'resp')} was deleted"))]
        self._record = record
        ending = ending_of(record.job)
        events = list(self._output.finish(ending.item_status))
        kind = LAST_EVENTS.get(ending.status, "response.failed")
        return [*events, {"type": kind, "response": self._response(ending)}]

    def _response(self, ending: Ending) -> dict[str, Any]:
        return response_object(self._record, self._body, ending, self._output)

    def _numbered(self, events: Iterable[ResponseEvent]) -> Iterator[bytes]:
        for event in events:
            self._number += 1
            if self._number > self._starting_after:
                yield frame(str(event["type"]), {**event, "sequence_number": self._number})

    @property
    def early_end_frame(self) -> bytes:
        """Of a server that leaves before the job is done."""
        name = external_id(self._record.job.id, "resp")
        event = error_event(ServerOverloaded(f"this stream ends here, but {name} goes on: retrieve it"))
        return frame("error", event)


def _begun_anew(record: JobRecord) -> CeleriacError:
    """Events that were numbered once cannot be taken back."""
    name = external_id(record.job.id, "resp")
    return ServerOverloaded(
        f"the model was replaced while {name} ran, and its output begins anew: discard what was sent, and read {name} "
        "without starting_after"
    )


def error_event(exc: CeleriacError) -> ResponseEvent:
    return {"type": "error", "code": exc.code, "message": exc.message, "param": exc.param}
