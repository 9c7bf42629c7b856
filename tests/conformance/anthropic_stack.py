"""One API for all tests of a module that speak Anthropic's words to it, and a worker that says what it is told."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import anthropic
import httpx
import pytest
import redis

from domain.catalog import Catalog, ModelSpec
from domain.jobs import JobStatus, external_id
from local.servers import EmbeddedRedis
from settings import Settings
from storage import job_queries
from storage.database import open_database, session_factory
from storage.tables import DEFAULT_TENANT_ID
from tests.databases import Databases
from tests.integration.api_harness import CATALOG, ApiServer, HandWorker, make_chunk
from tests.unit.test_models import write_model
from tests.waiting import wait_until

HI: Any = [{"role": "user", "content": "Hi"}]
THINKING = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}{# <think> #}"
ASKED: Any = {"model": "large", "max_tokens": 30, "messages": HI}


class NothingAsked(Exception):
    pass


@dataclass
class Stack:
    server: ApiServer
    worker: HandWorker
    client: anthropic.Anthropic
    http: httpx.Client
    is_asking: bool = False

    def newest_job_id(self) -> UUID | None:
        with self.worker.sessions() as session:
            return next((job.id for job in job_queries.list_jobs(session, DEFAULT_TENANT_ID, limit=1)), None)

    def answer_next(self, *texts: str, after: UUID | None = None, **last: Any) -> str:
        """Run the next job that waits, behind `after`, so that it says `texts`, the last with the fields `last`; its
        id."""

        def waiting() -> Any:
            if not self.is_asking:
                raise NothingAsked
            with self.worker.sessions() as session:
                return job_queries.list_jobs(
                    session, DEFAULT_TENANT_ID, status=JobStatus.QUEUED, after=after, order="asc", limit=1
                )

        [waiting_job] = wait_until(waiting)
        job = self.worker.claim(external_id(waiting_job.id))
        ending = {"finish_reason": "stop"} | last
        for number, text in enumerate(texts, start=1):
            self.worker.commit(job, make_chunk(number, text, **(ending if number == len(texts) else {})))
        self.worker.finish(job, *texts, **ending)
        return external_id(job.id)

    @contextmanager
    def saying(self, *texts: str, **last: Any) -> Iterator[None]:
        """What is asked inside is answered with `texts`."""
        self.is_asking = True
        before = self.newest_job_id()  # one that nobody answered may still wait
        with ThreadPoolExecutor(1) as threads:
            answered = threads.submit(self.answer_next, *texts, after=before, **last)
            try:
                yield
            except BaseException:
                self.is_asking = False  # nobody waits for a question that was refused
                if not isinstance(answered.exception(), NothingAsked):
                    answered.result()  # why there was no answer
                raise
            answered.result()

    def ask(self, *texts: str, last: dict[str, Any] | None = None, **asked: Any) -> anthropic.types.Message:
        with self.saying(*texts, **(last or {})):
            message: anthropic.types.Message = self.client.messages.create(**(ASKED | asked))
        return message


@pytest.fixture(scope="module")
def stack(
    databases: Databases,
    redis_server: EmbeddedRedis,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Stack]:
    redis_server.start()
    own = databases.take()
    settings = Settings(database_url=own.url, redis_url=redis_server.url)
    settings = settings.model_copy(update={"stream_heartbeat_seconds": 0.2, "no_workers_seconds": 3600.0})
    folder = write_model(tmp_path_factory.mktemp("thinker") / "thinker", chat_template=THINKING)
    thinker = ModelSpec(id="thinker", path=str(folder), backend="fake", max_model_len=1024)
    database = open_database(settings.database_url)
    try:
        with (
            ApiServer(settings, Catalog([*CATALOG, thinker])) as server,
            redis.Redis.from_url(settings.redis_url) as client,
            anthropic.Anthropic(base_url=server.url, api_key="any", max_retries=0, timeout=60) as sdk,
            server.client() as http,
        ):
            yield Stack(server, HandWorker(session_factory(database), client), sdk, http)
    finally:
        database.dispose()
        databases.give_back(own)
