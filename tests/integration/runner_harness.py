"""A JobRunner on real PostgreSQL, real Redis and a real engine process, and what its tests ask of it."""

import contextlib
import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from uuid import UUID, uuid4

import redis
from sqlalchemy import select
from sqlalchemy.orm import Session, sessionmaker

from domain.jobs import JobKind, JobStatus
from domain.model_names import model_name
from domain.requests import EmbeddingRequest, GenerationRequest, GenerationResult, JobOutput, SamplingParams, TokenChunk
from gpu_worker.engine.fake_tokens import fake_text
from gpu_worker.quarantine import SHIPPED_RULES, QuarantineRules
from gpu_worker.serving import JobRunner
from gpu_worker.threads import RunnerEvent, RunnerEventKind, WorkerFailure
from settings import Settings
from storage.stream_channels import channel_of
from storage.tables import Job, JobChunk, JobResult
from tests.waiting import SECONDS, wait_until

MODEL = "test-model"
PROMPT = [5, 6, 7]
ADAPTERS = '{ poems = "poems", prose = "prose" }'


class RecordingRunner:
    """A started JobRunner and everything it told."""

    def __init__(self, settings: Settings, rules: QuarantineRules = SHIPPED_RULES) -> None:
        self.events: list[RunnerEvent] = []
        self.unhealthy: list[WorkerFailure] = []
        self.owner = uuid4()
        self.runner = JobRunner(
            model=MODEL,
            owner=self.owner,
            hostname="gpu@test",
            on_event=self.events.append,
            on_unhealthy=self.unhealthy.append,
            settings=settings,
            quarantine_rules=rules,
        )
        self.runner.start()

    def wait_until_ready(self) -> None:
        wait_until(lambda: self.runner.stats().is_engine_ready, "the engine is ready")

    def offer(self, job_ids: Sequence[UUID]) -> None:
        """A ticket for each of these jobs, by its id, so that as many are claimed: these, if no others are queued."""
        for job_id in job_ids:
            self.runner.offer(job_id)

    def story(self, job_id: UUID) -> list[RunnerEventKind]:
        """Of the job, not of its ticket."""
        kinds = [event.kind for event in self.events if event.job_id == job_id]
        return [kind for kind in kinds if kind is not RunnerEventKind.SPENT]

    def num_spent(self) -> int:
        return sum(event.kind is RunnerEventKind.SPENT for event in self.events)

    def has_let_go_of(self, job_ids: Sequence[UUID]) -> bool:
        """Each of them was dropped, released, or ended here."""
        return all(self.story(job_id) and self.story(job_id)[-1] != RunnerEventKind.CLAIMED for job_id in job_ids)

    def ends(self, job_id: UUID) -> list[JobStatus | None]:
        return [event.status for event in self.events if event.job_id == job_id and event.status is not None]

    def wait_for(self, kind: RunnerEventKind, job_ids: Sequence[UUID], *, seconds: float = SECONDS) -> None:
        wait_until(lambda: all(kind in self.story(job_id) for job_id in job_ids), f"all are {kind}", seconds=seconds)

    @property
    def engine_pid(self) -> int:
        """Of the engine process as it is now."""
        engine = self.runner._runner._supervisor._engine
        assert engine is not None
        assert engine.pid is not None
        return engine.pid

    def signal_engine(self, signal_number: signal.Signals) -> int:
        pid = self.engine_pid
        os.kill(pid, signal_number)
        return pid


class Rig:
    """A database, a Redis and a catalog; jobs go in, runners run them, and the rows are looked at."""

    def __init__(self, sessions: sessionmaker[Session], settings: Settings, make_job: Any, context_length: int) -> None:
        self.sessions = sessions
        self.settings = settings
        self._make_job = make_job
        self._context_length = context_length
        self._runners: list[RecordingRunner] = []
        self.write_catalog()

    def write_catalog(self, *, max_num_seqs: int = 8, **knobs: object) -> None:
        """The model of runners started from now on; `knobs` are the fake back end's."""
        lines = ["[[models]]", f'id = "{MODEL}"', 'path = "none"', 'backend = "fake"']
        lines += [f"max_model_len = {self._context_length}", f"max_num_seqs = {max_num_seqs}"]
        lines += [f"adapters = {ADAPTERS}", "[models.fake]"]
        lines += [f"{name} = {json.dumps(value)}" for name, value in ({"step_seconds": 0.005} | knobs).items()]
        self.settings.models_file.write_text("\n".join(lines))

    def start(
        self, *, wait: bool = True, rules: QuarantineRules = SHIPPED_RULES, **settings: object
    ) -> RecordingRunner:
        runner = RecordingRunner(self.settings.model_copy(update=settings), rules)
        self._runners.append(runner)
        if wait:
            runner.wait_until_ready()
        return runner

    def close(self) -> None:
        for runner in self._runners:
            with contextlib.suppress(ProcessLookupError, AssertionError):
                runner.signal_engine(signal.SIGCONT)
            runner.runner.stop(release=True)

    # Jobs

    def add_job(
        self,
        *,
        max_tokens: int = 20,
        params: SamplingParams | None = None,
        adapter: str | None = None,
        **columns: Any,
    ) -> UUID:
        params = params or SamplingParams(temperature=0.0)
        request = GenerationRequest(model=model_name(MODEL, adapter), prompt="x", params=params)
        columns = {"num_prompt_tokens": 3, "cost": 3 + params.num_sequences * max_tokens, **columns}
        job: Job = self._make_job(
            request=request,
            prompt_token_ids=PROMPT,
            max_tokens=max_tokens,
            model=MODEL,
            adapter=adapter,
            model_revision="fake:main",
            **columns,
        )
        return job.id

    def add_embedding(self, inputs: list[list[int]], dimensions: int | None = None, **columns: Any) -> UUID:
        job: Job = self._make_job(
            request=EmbeddingRequest(model=MODEL, inputs=tuple(map(tuple, inputs)), dimensions=dimensions),
            prompt_token_ids=[token_id for token_ids in inputs for token_id in token_ids],
            input_lengths=[len(token_ids) for token_ids in inputs],
            kind=JobKind.EMBEDDING,
            cost=3,  # of its prompt
            max_tokens=0,
            model=MODEL,
            model_revision="fake:main",
            **columns,
        )
        return job.id

    def add_jobs(self, num_jobs: int, **columns: Any) -> list[UUID]:
        return [self.add_job(seed=seed, **columns) for seed in range(num_jobs)]

    def job(self, job_id: UUID) -> Job:
        with self.sessions() as session:
            return session.get_one(Job, job_id)

    def chunks(self, job_id: UUID) -> list[TokenChunk]:
        statement = select(JobChunk.chunk).where(JobChunk.job_id == job_id).order_by(JobChunk.sequence_number)
        with self.sessions() as session:
            return list(session.scalars(statement))

    def attempts_of_chunks(self, job_id: UUID) -> list[int]:
        statement = select(JobChunk.attempt).where(JobChunk.job_id == job_id).order_by(JobChunk.sequence_number)
        with self.sessions() as session:
            return list(session.scalars(statement))

    def output(self, job_id: UUID) -> JobOutput:
        with self.sessions() as session:
            return session.scalars(select(JobResult.result).where(JobResult.job_id == job_id)).one()

    def result(self, job_id: UUID) -> GenerationResult:
        result = self.output(job_id)
        assert isinstance(result, GenerationResult)
        return result

    def wait_for_tokens(self, job_ids: Sequence[UUID], at_least: int = 1) -> None:
        wait_until(
            lambda: all(self.job(job_id).num_committed_tokens >= at_least for job_id in job_ids),
            f"{len(job_ids)} jobs have {at_least} tokens",
        )

    def assert_intact(self, job_id: UUID) -> None:
        """Completed, its chunks are numbered without a hole, and they are the result, each token once."""
        job, chunks, result = self.job(job_id), self.chunks(job_id), self.result(job_id)
        assert job.status is JobStatus.COMPLETED, (job.status, job.error)
        assert [chunk.sequence_number for chunk in chunks] == list(range(1, job.committed_sequence_number + 1))
        for choice in result.choices:
            own = [chunk for chunk in chunks if chunk.index == choice.index]
            assert "".join(chunk.text for chunk in own) == choice.text
            assert choice.text == fake_text(PROMPT, job.seed, choice.index, job.max_tokens, adapter=job.adapter)
            assert sum(len(chunk.token_ids) for chunk in own) == choice.num_tokens == job.max_tokens
            assert [bool(chunk.finish_reason) for chunk in own] == [False] * (len(own) - 1) + [True]


@contextlib.contextmanager
def listening(redis_url: str, job_id: UUID) -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """What is published of a job meanwhile: a function that returns all of it so far."""
    heard: list[dict[str, Any]] = []
    with redis.Redis.from_url(redis_url) as client, client.pubsub(ignore_subscribe_messages=True) as subscription:
        subscription.subscribe(channel_of(job_id))

        def read() -> list[dict[str, Any]]:
            while (message := subscription.get_message(timeout=0.02)) is not None:
                heard.append(json.loads(message["data"]))
            return heard

        read()
        yield read
