"""A database without room refuses writes with 53100: nothing breaks, and all goes on when there is room again."""

from collections.abc import Iterator
from contextlib import contextmanager

import httpx
from sqlalchemy import text
from sqlalchemy.orm import Session, sessionmaker

from gpu_worker.threads import RunnerEventKind
from tests.integration.api_harness import body, post_job
from tests.integration.runner_harness import Rig
from tests.waiting import wait_until


@contextmanager
def no_room_for(table: str, session_factory: sessionmaker[Session]) -> Iterator[None]:
    """Every insert raises what PostgreSQL raises when it cannot extend a file."""
    with session_factory.begin() as session:
        session.execute(
            text(
                "CREATE OR REPLACE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
                "RAISE EXCEPTION 'could not extend file: No space left on device' USING ERRCODE = '53100'; END $$"
            )
        )
        session.execute(text(f"CREATE TRIGGER no_room BEFORE INSERT ON {table} EXECUTE FUNCTION refuse()"))
    yield
    with session_factory.begin() as session:
        session.execute(text(f"DROP TRIGGER no_room ON {table}"))


def test_the_api_asks_clients_to_come_back(http: httpx.Client, session_factory: sessionmaker[Session]) -> None:
    with no_room_for("jobs", session_factory):
        refused = http.post("/v1/jobs", json=body())
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "storage_unavailable")
        assert int(refused.headers["retry-after"]) >= 1
        assert http.get("/v1/jobs").status_code == 200
    post_job(http)


def test_running_jobs_wait_for_room_and_lose_nothing(rig: Rig, session_factory: sessionmaker[Session]) -> None:
    job_ids = rig.add_jobs(3, max_tokens=100)
    worker = rig.start()
    worker.offer(job_ids)
    rig.wait_for_tokens(job_ids)
    with no_room_for("job_chunks", session_factory):
        wait_until(lambda: worker.runner._runner._storage_thread.is_away, "the worker has noticed")
    worker.wait_for(RunnerEventKind.ENDED, job_ids)
    for job_id in job_ids:
        rig.assert_intact(job_id)
        assert rig.job(job_id).attempt == 1
