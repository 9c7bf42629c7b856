"""A whole answer, for which the client waits: an error with its own status while that is still possible."""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from api.errors import error_response
from api.large_work import size_of
from api.openai.running import Run, first_unserved, headers_of, refuse_unfinished
from api.protocol import CUT
from api.sse import wait_for_disconnect, wait_for_revocation
from domain.errors import AuthenticationFailed, CeleriacError, DeadlineExceeded, ServerOverloaded
from domain.ids import external_id
from storage.job_queries import JobRecord

log = logging.getLogger(__name__)

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
        code = orjson.loads(answer.body)["error"]["code"]
        log.info("cut a kept-alive answer that came to nothing", extra={"job_id": self._name, "code": code})
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
