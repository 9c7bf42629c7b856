"""The real application under a real server, and a worker whose every step the test decides."""

import asyncio
import json
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self
from uuid import UUID, uuid4

import httpx
import redis
import uvloop
from sqlalchemy.orm import Session, sessionmaker

from api.app import create_app
from api.connections import open_socket
from api.server import GRACE_SECONDS, make_server
from api.services import Services
from celeriac.client import StreamEvent
from celeriac.client.protocol import parse_events
from domain.catalog import Catalog, ModelSpec
from domain.jobs import FinishReason, JobError, JobStatus, Usage, parse_id
from domain.requests import EmbeddingResult, TokenChunk, encode_vector
from settings import Settings
from storage import jobs
from storage.jobs import ChunkCommit, ClaimedJob, Finalisation
from storage.partial_results import partial_result
from storage.streams import publish
from tests.storage_samples import claim_these
from tests.waiting import SECONDS, wait_until

MODEL = "fake"
CONTEXT = 64
CATALOG = Catalog(
    [
        ModelSpec(id=MODEL, path="fake", backend="fake", max_model_len=CONTEXT, max_num_seqs=4),
        ModelSpec(id="large", path="fake", backend="fake", max_model_len=100_000),
    ]
)
LEASE_SECONDS = 60.0


class ApiServer:
    """The API on a free port, on an event loop of its own in a thread."""

    def __init__(self, settings: Settings, catalog: Catalog = CATALOG) -> None:
        self.app = create_app(settings, catalog)
        self._socket = open_socket("127.0.0.1", 0)
        self.port: int = self._socket.getsockname()[1]
        self._server = make_server(self.app)
        self._thread = threading.Thread(target=self._run, name="api")
        self.url = f"http://127.0.0.1:{self.port}"

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._server.serve(sockets=[self._socket]))

    def __enter__(self) -> Self:
        self._thread.start()
        try:
            wait_until(lambda: self._server.started or not self._thread.is_alive(), "the API has started")
            assert self._server.started, "the API did not start"
        except BaseException:
            self.stop()  # one left behind would go on asking for a database that is dropped
            raise
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self, *, grace_seconds: int = GRACE_SECONDS) -> None:
        """As at SIGTERM; returns when the server has ended. A busy machine may take long to end open requests."""
        self._server.config.timeout_graceful_shutdown = grace_seconds
        self._server.should_exit = True
        wait_until(lambda: not self._thread.is_alive(), "the API has stopped", pause_seconds=0.002)
        self._socket.close()

    @property
    def services(self) -> Services:
        services: Services = self.app.state.services
        return services

    def client(self, key: str | None = None) -> httpx.Client:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=30)


@dataclass
class HandWorker:
    """Does to jobs what a GPU worker does, through the same statements, when told to."""

    sessions: sessionmaker[Session]
    redis: redis.Redis
    owner: UUID = field(default_factory=uuid4)

    def claim(self, job_id: str) -> ClaimedJob:
        """Also tells the streams."""
        with self.sessions.begin() as session:
            [job] = claim_these(
                session, [parse_id(job_id)], owner=self.owner, model_revision="fake:main", lease_seconds=LEASE_SECONDS
            )
        publish(self.redis, [(job.id, JobStatus.IN_PROGRESS)])
        return job

    def commit(self, job: ClaimedJob, *chunks: TokenChunk, is_published: bool = True) -> None:
        commit = ChunkCommit(job.id, job.attempt, chunks)
        with self.sessions.begin() as session:
            assert jobs.commit_chunks(session, [commit], lease_seconds=LEASE_SECONDS), "fenced off"
        if is_published:
            publish(self.redis, [(job.id, chunk) for chunk in chunks])

    def say(self, job: ClaimedJob, *texts: str, first: int = 1, is_published: bool = True) -> None:
        """One commit per text, numbered from `first`."""
        for number, text in enumerate(texts, start=first):
            self.commit(job, make_chunk(number, text), is_published=is_published)

    def finish(
        self,
        job: ClaimedJob,
        *texts: str,
        status: JobStatus = JobStatus.COMPLETED,
        error: JobError | None = None,
        **last: Any,
    ) -> None:
        """End the job after chunks that said `texts`, the last with the fields `last`; without texts, completed, it has
        said the empty one. Cut off, its result is what storage finds committed."""
        chunks = [make_chunk(number, text) for number, text in enumerate(texts, start=1)]
        chunks[-1:] = [chunk.model_copy(update=last) for chunk in chunks[-1:]]
        num_prompt_tokens = len(job.prompt_token_ids)
        result = partial_result(
            chunks or [make_chunk(1, "")], num_prompt_tokens=num_prompt_tokens, cut_off_by=FinishReason.STOP
        )
        ending = Finalisation(
            job.id,
            job.attempt,
            last_sequence_number=len(chunks),
            status=status,
            result=result if status is JobStatus.COMPLETED else None,
            finish_reason=FinishReason.STOP if status is JobStatus.COMPLETED else None,
            error=error,
        )
        with self.sessions.begin() as session:
            assert jobs.finalise(session, [ending]) == [job.id], "fenced off"
        publish(self.redis, [(job.id, status)])

    def embed(self, job_id: str, *vectors: Sequence[float]) -> None:
        """The whole life of an embedding job."""
        job = self.claim(job_id)
        result = EmbeddingResult(
            embeddings=tuple(encode_vector(struct.pack(f"<{len(vector)}f", *vector)) for vector in vectors),
            dimensions=len(vectors[0]),
            usage=Usage(prompt_tokens=len(job.prompt_token_ids)),
        )
        ending = Finalisation(
            job.id,
            job.attempt,
            last_sequence_number=0,
            status=JobStatus.COMPLETED,
            result=result,
            finish_reason=FinishReason.STOP,
            error=None,
        )
        with self.sessions.begin() as session:
            assert jobs.finalise(session, [ending]) == [job.id], "fenced off"
        publish(self.redis, [(job.id, JobStatus.COMPLETED)])

    def release(self, job: ClaimedJob) -> None:
        with self.sessions.begin() as session:
            [released] = jobs.release(session, [job.id], owner=self.owner)
            assert released.job_id == job.id
        publish(self.redis, [(job.id, JobStatus.QUEUED)])

    def pause(self, job: ClaimedJob) -> None:
        with self.sessions.begin() as session:
            [paused] = jobs.pause(session, [job.id], owner=self.owner)
            assert paused.job_id == job.id
        publish(self.redis, [(job.id, JobStatus.QUEUED)])

    def run(self, job_id: str, *texts: str) -> None:
        """The whole life of a job."""
        job = self.claim(job_id)
        self.say(job, *texts)
        self.finish(job, *texts)


def make_chunk(number: int, text: str, *, index: int = 0, **fields: Any) -> TokenChunk:
    fields.setdefault("token_ids", tuple(text.encode()))
    return TokenChunk(sequence_number=number, index=index, text=text, **fields)


def body(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": "Hello", "params": {"max_tokens": 16}} | fields


def post_job(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    response = client.post("/v1/jobs", json=body(**fields))
    assert response.status_code == 202, response.text
    return dict(response.json())


@contextmanager
def open_events(client: httpx.Client, job_id: str, **options: Any) -> Iterator[Iterator[StreamEvent]]:
    with client.stream("GET", f"/v1/jobs/{job_id}/events", **options) as response:
        assert response.status_code == 200, response.read()
        yield parse_events(response.iter_lines())


def all_events(client: httpx.Client, job_id: str, **options: Any) -> list[StreamEvent]:
    with open_events(client, job_id, **options) as events:
        return list(events)


def numbered(events: list[StreamEvent]) -> list[tuple[str, str | None, str]]:
    """The events that have an id, as something to compare."""
    return [(event.name, event.id, json.dumps(event.data, sort_keys=True)) for event in events if event.id]


def raw_request(port: int, data: bytes) -> bytes:
    """What the server answers to these bytes, which no HTTP client would send."""
    with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while part := connection.recv(65_536):
            answer += part
        return answer
