"""JobRunner on real parts: what is offered runs to its end, and SQL, the events and the live channel agree on it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy.orm import Session, sessionmaker

from gpu_worker.runner_events import RunnerEventKind
from settings import Settings
from tests.integration.runner_harness import Rig

WHOLE_STORY = [RunnerEventKind.CLAIMED, RunnerEventKind.ENDED]


@pytest.fixture
def rig(
    tmp_path: Path, session_factory: sessionmaker[Session], database_url: str, redis_url: str, make_job: object
) -> Iterator[Rig]:
    settings = Settings(database_url=database_url, redis_url=redis_url, models_file=tmp_path / "models.toml")
    rig = Rig(tmp_path, session_factory, settings, make_job)
    yield rig
    rig.close()


def test_offered_jobs_run_to_completion_and_their_chunks_are_their_results(rig: Rig) -> None:
    job_ids = rig.add_jobs(20)  # more than slots
    worker = rig.start()
    for job_id in job_ids:
        worker.runner.offer(job_id)
    worker.wait_for(RunnerEventKind.ENDED, job_ids)
    for job_id in job_ids:
        rig.assert_intact(job_id)
        assert worker.story(job_id) == WHOLE_STORY
    assert worker.runner.stats().num_running == 0
    assert worker.runner.num_free == 8
