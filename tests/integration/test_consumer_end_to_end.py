"""The GPU worker as it ships, with the fake back end: dispatched jobs run, and what Flower asks for holds in SQL."""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from uuid import UUID

import pytest
import redis
from celery import Celery

from domain.catalog import Catalog
from domain.jobs import JobStatus, WorkerState, external_id
from storage import workers
from tasks.app import make_app
from tasks.dispatch import count_waiting, dispatch
from tests.integration.consumer_harness import EventLog, events
from tests.integration.runner_harness import MODEL, Rig
from tests.prepared import nursery
from tests.waiting import SECONDS, wait_until

__all__ = ["events"]

LONG = 3000  # tokens: longer than any of these tests waits


class Worker:
    """`celery -A gpu_worker.app worker` on a rig's database and Redis."""

    def __init__(self, rig: Rig, folder: Path) -> None:
        self._rig = rig
        self._log = folder / "worker.log"
        settings = rig.settings
        environment = os.environ | {
            "CELERIAC_DATABASE_URL": settings.database_url,
            "CELERIAC_REDIS_URL": settings.redis_url,
            "CELERIAC_MODELS_FILE": str(settings.models_file),
        }
        with self._log.open("wb") as log:
            arguments = ["-A", "gpu_worker.app", "worker"]
            self.process = nursery().start("celery", arguments, environment=environment, output=log)
        wait_until(lambda: self.process.poll() is not None or self.hostnames(), "the worker takes jobs")
        assert self.process.poll() is None, self._log.read_text()

    def hostnames(self) -> list[str]:
        with self._rig.sessions() as session:
            return [live.hostname for live in workers.list_live(session) if live.state is WorkerState.READY]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def worker(rig: Rig, tmp_path: Path) -> Iterator[Worker]:
    worker = Worker(rig, tmp_path)
    yield worker
    worker.close()


@pytest.fixture
def app(rig: Rig) -> Iterator[Celery]:
    app = make_app(rig.settings)
    yield app
    app.close()


@pytest.fixture
def send(rig: Rig) -> Iterator[Callable[[], int]]:
    """What the janitor does: send the messages that are missing."""
    spec = Catalog.load(rig.settings.models_file).get(MODEL)
    with redis.Redis.from_url(rig.settings.redis_url) as client:
        yield lambda: dispatch(rig.sessions, client, spec, rig.settings)


def have_status(rig: Rig, job_ids: Sequence[UUID], status: JobStatus) -> bool:
    return all(rig.job(job_id).status is status for job_id in job_ids)


def test_dispatched_jobs_run_to_their_end_and_flower_hears_of_each(
    rig: Rig, worker: Worker, send: Callable[[], int], events: EventLog
) -> None:
    job_ids = rig.add_jobs(40)  # more than slots and window
    assert send() <= 16  # the window; the worker may have polled before
    wait_until(lambda: have_status(rig, job_ids, JobStatus.COMPLETED), "all jobs are completed")
    for job_id in job_ids:
        rig.assert_intact(job_id)
        assert rig.job(job_id).attempt == 1
    story = ["received", "started", "succeeded"]
    wait_until(lambda: all(events.of(job_id) == story for job_id in job_ids), "every end is told")
    with redis.Redis.from_url(rig.settings.redis_url) as client:
        assert (client.hlen("unacked"), count_waiting(client, f"celeriac.{MODEL}")) == (0, 0)


def test_a_revoke_cancels_the_job_in_sql(
    rig: Rig, worker: Worker, send: Callable[[], int], events: EventLog, app: Celery
) -> None:
    job_id = rig.add_job(max_tokens=LONG)
    send()
    rig.wait_for_tokens([job_id])
    app.control.revoke(external_id(job_id), terminate=True)
    wait_until(lambda: have_status(rig, [job_id], JobStatus.CANCELLED), "the job is cancelled")
    assert rig.result(job_id).choices[0].text  # its output is kept
    wait_until(lambda: events.of(job_id) == ["received", "started", "revoked"], "the story is told")


def test_a_job_that_the_worker_found_in_sql_is_shown_and_revoked_like_any_other(
    rig: Rig, worker: Worker, events: EventLog, app: Celery, send: Callable[[], int]
) -> None:
    """As after the broker was emptied: there is no message, or it comes late."""
    job_id = rig.add_job(max_tokens=LONG)
    rig.wait_for_tokens([job_id])
    send()
    (name,) = worker.hostnames()
    wait_until(lambda: events.of(job_id)[:2] == ["received", "started"], "Flower hears of it")
    active = app.control.inspect(destination=[name], timeout=SECONDS).active()[name]
    assert [task["id"] for task in active] == [external_id(job_id)]

    app.control.revoke(external_id(job_id), terminate=True)
    wait_until(lambda: have_status(rig, [job_id], JobStatus.CANCELLED), "the job is cancelled")
    wait_until(lambda: events.of(job_id)[-1] == "revoked", "the story is told")
    assert events.of(job_id).count("started") == 1


def test_the_worker_has_a_unique_name_and_shows_its_engine(rig: Rig, worker: Worker, app: Celery) -> None:
    (name,) = worker.hostnames()
    assert name.startswith(f"gpu-{MODEL}-")
    stats = app.control.inspect(destination=[name], timeout=SECONDS).stats()[name]
    assert stats["engine"].items() >= {"slots": 8, "free": 8, "running": 0, "ready": True}.items()
    assert stats["pool"]["max-concurrency"] == 8


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGQUIT])
def test_a_worker_that_leaves_completes_or_releases_its_jobs(
    rig: Rig, worker: Worker, send: Callable[[], int], signal_number: signal.Signals
) -> None:
    is_drain = signal_number == signal.SIGTERM
    job_ids = rig.add_jobs(12, max_tokens=100 if is_drain else LONG)  # 100 take half a second
    send()
    rig.wait_for_tokens(job_ids[:8])
    worker.process.send_signal(signal_number)
    assert worker.process.wait() == 0
    ended = {job_id for job_id in job_ids if rig.job(job_id).status is JobStatus.COMPLETED}
    assert ended >= set(job_ids[:8]) if is_drain else not ended
    for job_id in set(job_ids) - ended:
        assert rig.job(job_id).status is JobStatus.QUEUED
        assert rig.job(job_id).num_failures == 0
    with redis.Redis.from_url(rig.settings.redis_url) as client:
        assert client.hlen("unacked") == 0
    assert worker.hostnames() == []
