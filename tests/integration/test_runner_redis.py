"""Redis away or empty: jobs run as ever, streams fall back to SQL, and room is refilled."""

import time

import redis

from gpu_worker.threads import RunnerEventKind
from local.servers import EmbeddedRedis
from tests.integration.runner_harness import Rig, listening
from tests.waiting import slowness, wait_until


def test_without_redis_jobs_run_as_ever(rig: Rig, redis_server: EmbeddedRedis) -> None:
    job_ids = rig.add_jobs(6, max_tokens=100)
    worker = rig.start()
    worker.offer(job_ids)
    rig.wait_for_tokens(job_ids)
    redis_server.stop()
    started_at = time.monotonic()
    worker.wait_for(RunnerEventKind.ENDED, job_ids)
    assert time.monotonic() - started_at < 5 * slowness()
    for job_id in job_ids:
        rig.assert_intact(job_id)


def test_publishing_goes_on_when_redis_is_back(rig: Rig, redis_server: EmbeddedRedis) -> None:
    job_id = rig.add_job(max_tokens=1500)
    worker = rig.start()
    worker.offer([job_id])
    rig.wait_for_tokens([job_id])
    redis_server.stop()
    wait_until(lambda: worker.runner._runner._storage.notifier.is_paused, "the worker has noticed")
    redis_server.start()
    with listening(redis_server.url, job_id) as read:
        wait_until(read, "something is published again")
    worker.runner.cancel(job_id)
    worker.wait_for(RunnerEventKind.ENDED, [job_id])


def test_finished_jobs_make_room_for_waiting_ones_at_once(rig: Rig) -> None:
    """The worker dispatches for the room it made, without the janitor: the queue holds messages of the rest."""
    first, rest = rig.add_job(), rig.add_jobs(30)
    worker = rig.start()
    worker.offer([first])
    worker.wait_for(RunnerEventKind.ENDED, [first])
    with redis.Redis.from_url(rig.settings.redis_url) as client:
        wait_until(lambda: client.llen(f"celeriac.{rig.job(first).model}") > 0, "the rest is dispatched")
    assert len(rest) == 30
