"""Jobs that had begun under a revision of their model: who may go on with them, and what becomes of them without."""

import json
from collections.abc import Callable, Iterator
from uuid import UUID, uuid4

import httpx
import pytest
import redis
from sqlalchemy import select
from sqlalchemy.orm import Session, sessionmaker

from domain.jobs import JobStatus, WorkerState, parse_id
from domain.requests import GenerationResult
from maintenance.janitor import Janitor, RevisionWatch
from settings import Settings
from storage import job_queries, jobs, maintenance, workers
from storage.jobs import ChunkCommit, ClaimedJob
from storage.streams import publish
from storage.tables import Job, JobChunk
from storage.workers import WorkerReport
from tests.conftest import MakeJob
from tests.integration.api_harness import CATALOG, MODEL, HandWorker, all_events, make_chunk, open_events, post_job
from tests.storage_samples import chunk, claim, claim_these
from tests.waiting import wait_until

Sessions = sessionmaker[Session]
GONE, SERVED = "fake:old", "fake:main"


def serve(sessions: Sessions, revision: str | None, *, model: str = MODEL, state: str = "ready") -> UUID:
    """A live worker of this revision."""
    worker = uuid4()
    report = WorkerReport(worker, "gpu@here", model, 4, 0, 0.0, model_revision=revision, state=WorkerState(state))
    with sessions.begin() as session:
        workers.heartbeat(session, report)
    return worker


def begin(sessions: Sessions, job_id: UUID, *texts: str, revision: str = GONE) -> ClaimedJob:
    """The job under way with this output, lost by its worker, and queued again."""
    owner = uuid4()
    with sessions.begin() as session:
        [job] = claim_these(session, [job_id], owner=owner, model_revision=revision, lease_seconds=60)
        chunks = [make_chunk(number, text) for number, text in enumerate(texts, start=1)]
        assert jobs.commit_chunks(session, [ChunkCommit(job.id, job.attempt, chunks)], lease_seconds=60)
        assert jobs.release(session, [job.id], owner=owner)
    return job


class TestClaims:
    def test_a_claim_writes_the_revision_that_runs(self, session: Session, make_job: MakeJob) -> None:
        """Else its own output is taken for another revision's, and nobody goes on with it."""
        job, owner = make_job(model_revision="accepted"), uuid4()
        claim(session, job.id, owner=owner, model_revision="runs")
        jobs.commit_chunks(session, [ChunkCommit(job.id, 1, [chunk(1)])], lease_seconds=60)
        jobs.release(session, [job.id], owner=owner)
        assert claim(session, job.id, model_revision="accepted") == []
        [again] = claim(session, job.id, model_revision="runs")
        assert again.committed_chunks == [chunk(1)]
        assert session.scalar(select(Job.model_revision).where(Job.id == job.id)) == "runs"

    def test_so_does_a_claim_without_a_message(self, session: Session, make_job: MakeJob) -> None:
        job = make_job(model_revision="accepted")
        [claimed] = jobs.claim(session, job.model, limit=1, owner=uuid4(), model_revision="runs", lease_seconds=60)
        assert claimed.id == job.id
        assert session.scalar(select(Job.model_revision).where(Job.id == job.id)) == "runs"


def test_a_job_that_its_server_cannot_continue_begins_anew_under_the_same_revision(
    session_factory: Sessions, make_job: MakeJob
) -> None:
    job, untouched = (make_job(model=MODEL, prompt_token_ids=[1, 2]) for _ in range(2))
    for one in (job, untouched):
        begin(session_factory, one.id, "an old ", "text")
    with session_factory.begin() as session:
        [restarted] = jobs.start_over(session, [job.id])
        assert restarted.job_id == job.id
        assert jobs.start_over(session, [job.id]) == []
    with session_factory() as session:
        chunks = session.scalars(select(JobChunk.chunk).where(JobChunk.job_id == job.id)).all()
        assert [(one.sequence_number, one.is_reset) for one in chunks] == [(3, True)]
        row = session.get_one(Job, job.id)
        assert (row.num_failures, row.num_committed_tokens) == (0, 0)
        assert session.get_one(Job, untouched.id).reset_sequence_number == 0


@pytest.fixture
def make_janitor(session_factory: Sessions, redis_url: str) -> Iterator[Callable[..., Janitor]]:
    client = redis.Redis.from_url(redis_url)
    yield lambda **settings: Janitor(session_factory, client, CATALOG, Settings(redis_url=redis_url, **settings))
    client.close()


class TestPolicies:
    """`CELERIAC_REVISION_POLICY`, once the revision was gone for CELERIAC_REVISION_SECONDS."""

    def test_by_default_the_job_begins_anew_under_the_revision_that_is_served(
        self, session_factory: Sessions, make_job: MakeJob, make_janitor: Callable[..., Janitor]
    ) -> None:
        job = make_job(model=MODEL, prompt_token_ids=[1, 2])
        begin(session_factory, job.id, "an old ", "text")
        serve(session_factory, SERVED)
        janitor = make_janitor(revision_seconds=0.01)
        moved = wait_until(lambda: janitor.tick().get("moved to another revision"))
        assert moved == 1
        with session_factory.begin() as session:
            [claimed] = claim(session, job.id, model_revision=SERVED)
            row = session.get_one(Job, job.id, populate_existing=True)
            assert (row.num_failures, row.num_committed_tokens, row.model_revision) == (0, 0, SERVED)
            assert [one.is_reset for one in claimed.committed_chunks] == [True]
            [first] = jobs.commit_chunks(session, [ChunkCommit(job.id, 2, [chunk(4)])], lease_seconds=60)
            assert first.job_id == job.id
        with session_factory() as session:
            chunks = session.scalars(select(JobChunk.chunk).order_by(JobChunk.sequence_number)).all()
        assert [(one.sequence_number, one.is_reset) for one in chunks] == [(3, True), (4, False)]

    def test_fail_ends_it_and_keeps_what_it_had(
        self, session_factory: Sessions, make_job: MakeJob, make_janitor: Callable[..., Janitor]
    ) -> None:
        job = make_job(model=MODEL)
        begin(session_factory, job.id, "an old ", "text")
        serve(session_factory, SERVED)
        janitor = make_janitor(revision_seconds=0.01, revision_policy="fail")
        wait_until(lambda: janitor.tick().get("moved to another revision"))
        with session_factory() as session:
            record = job_queries.get(session, job.id, job.tenant_id)
        assert record is not None
        assert record.job.status is JobStatus.FAILED
        assert record.job.error is not None
        assert (record.job.error.code, record.job.error.retryable) == ("model_revision_gone", True)
        assert isinstance(record.result, GenerationResult)
        assert record.result.choices[0].text == "an old text"

    def test_wait_leaves_it_and_counts_it(
        self, session_factory: Sessions, make_job: MakeJob, make_janitor: Callable[..., Janitor]
    ) -> None:
        job = make_job(model=MODEL)
        begin(session_factory, job.id, "an old ", "text")
        serve(session_factory, SERVED)
        janitor = make_janitor(revision_seconds=0.001, revision_policy="wait")
        for _ in range(3):
            janitor.tick()
        with session_factory() as session:
            assert maintenance.figures(session)["gone_revision_jobs", f"{MODEL}/{GONE}"] == 1
            assert session.get_one(Job, job.id).committed_sequence_number == 2
        serve(session_factory, GONE)
        wait_until(lambda: janitor.tick() is not None and not _gone(session_factory))

    @pytest.mark.parametrize(
        "beside", [None, GONE, "nobody"], ids=["a worker that does not tell", "one that loads it", "no worker at all"]
    )
    def test_a_revision_that_may_be_served_is_not_gone(
        self,
        session_factory: Sessions,
        make_job: MakeJob,
        make_janitor: Callable[..., Janitor],
        beside: str | None,
    ) -> None:
        job = make_job(model=MODEL)
        begin(session_factory, job.id, "an old ", "text")
        if beside != "nobody":
            serve(session_factory, SERVED)
            serve(session_factory, beside, state="loading")
        janitor = make_janitor(revision_seconds=0.001)
        for _ in range(3):
            assert "moved to another revision" not in janitor.tick()
        with session_factory() as session:
            assert session.get_one(Job, job.id).reset_sequence_number == 0

    def test_the_time_counts_from_when_the_revision_went_and_begins_anew_when_it_comes_back(
        self, session_factory: Sessions, make_job: MakeJob
    ) -> None:
        job = make_job(model=MODEL)
        begin(session_factory, job.id, "text")
        serve(session_factory, SERVED)
        watch = RevisionWatch(session_factory, Settings(revision_seconds=100.0))
        assert watch.look(1000.0) == []
        assert watch.look(1099.0) == []
        old = serve(session_factory, GONE)
        assert watch.look(1105.0) == []
        with session_factory.begin() as session:
            workers.forget(session, old)
        assert watch.look(1110.0) == []
        assert watch.look(1209.0) == []
        assert len(watch.look(1215.0)) == 1


def _gone(sessions: Sessions) -> dict[tuple[str, str], int]:
    with sessions() as session:
        return jobs.gone_revisions(session, live_seconds=60)


class TestReaders:
    """Whoever reads is told that what came before is void: nothing is spliced, repeated or hidden."""

    def restart(self, sessions: Sessions, worker: HandWorker, job_id: UUID) -> None:
        serve(sessions, SERVED)
        with sessions.begin() as session:
            [job] = jobs.restart(session, MODEL, GONE, live_seconds=60)
        assert job.job_id == job_id
        publish(worker.redis, [(job_id, JobStatus.QUEUED)])

    def go_on(self, worker: HandWorker, name: str, *texts: str, first: int) -> None:
        job = worker.claim(name)
        worker.say(job, *texts, first=first)
        ending = jobs.Finalisation(job.id, job.attempt, first + len(texts) - 1, JobStatus.CANCELLED, None)
        with worker.sessions.begin() as session:
            assert jobs.finalise(session, [ending])
        publish(worker.redis, [(job.id, JobStatus.CANCELLED)])

    def test_an_open_stream_and_every_cursor_get_the_reset_before_the_new_text(
        self, session_factory: Sessions, http: httpx.Client, hand_worker: HandWorker
    ) -> None:
        name = post_job(http)["id"]
        job_id = parse_id(name)
        begin(session_factory, job_id, "an old ", "text")
        with open_events(http, name) as events:
            numbered = (event for event in events if event.id)
            seen = [next(numbered), next(numbered)]
            self.restart(session_factory, hand_worker, job_id)
            reset = next(numbered)
            self.go_on(hand_worker, name, "a new ", "one", first=4)
            seen += [reset, *events]
        assert [(event.name, event.id) for event in seen if event.id] == [
            ("output.delta", "1"),
            ("output.delta", "2"),
            ("job.reset", "3"),
            ("output.delta", "4"),
            ("output.delta", "5"),
            ("job.cancelled", "6"),
        ]
        assert seen[-1].data["output"]["text"] == "a new one"
        for cursor, first in ((0, "3"), (1, "3"), (2, "3"), (3, "4"), (4, "5")):
            again = [event for event in all_events(http, name, params={"starting_after": cursor}) if event.id]
            assert again[0].id == first
            assert (again[0].name == "job.reset") == (first == "3")

    def test_the_text_so_far_is_that_since_the_reset(
        self, session_factory: Sessions, http: httpx.Client, hand_worker: HandWorker
    ) -> None:
        name = post_job(http)["id"]
        begin(session_factory, parse_id(name), "an old ", "text")
        self.restart(session_factory, hand_worker, parse_id(name))
        assert http.get(f"/v1/jobs/{name}/output").text == ""
        assert http.get(f"/v1/jobs/{name}").json()["usage"]["completion_tokens"] == 0
        with open_events(http, name, params={"from": "snapshot"}) as events:
            snapshot = next(event for event in events if event.name == "job.snapshot")
        assert snapshot.data == {"job_id": name, "sequence_number": 3, "choices": []}
        assert http.post(f"/v1/jobs/{name}/cancel").json()["output"] is None

    def test_an_openai_stream_that_has_text_ends_in_an_error_and_one_without_goes_on(
        self, session_factory: Sessions, http: httpx.Client, hand_worker: HandWorker
    ) -> None:
        body = {"model": MODEL, "prompt": "Hello", "stream": True}
        with http.stream("POST", "/v1/completions", json=body) as response:
            name = response.headers["x-job-id"]
            begin(session_factory, parse_id(name), "an old ", "text")
            lines = (line for line in response.iter_lines() if line)
            assert "an old " in next(lines)
            self.restart(session_factory, hand_worker, parse_id(name))
            *_, last = lines
        assert "starts over" in json.loads(last.removeprefix("data: "))["error"]["message"]
        retry = {"x-stainless-retry-count": "1"}
        with http.stream("POST", "/v1/completions", json=body, headers=retry) as response:
            assert response.headers["x-job-id"] == name
            job = hand_worker.claim(name)
            hand_worker.say(job, "a new one", first=4)
            assert "a new one" in next(line for line in response.iter_lines() if "text" in line)
