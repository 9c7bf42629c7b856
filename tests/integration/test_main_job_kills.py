"""Greedy jobs of the embedded model, in company, while their worker and their engine are killed and drained.

What they bring must be, token by token, what they bring undisturbed: a continuation has nothing to guess.
"""

import asyncio
import json
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from domain.jobs import parse_id
from settings import ROOT
from tests.chaos.checker import judge, read_stored
from tests.chaos.clients import Clients, History
from tests.chaos.plant import Plant, start_prepared
from tests.integration.test_main_job import MODEL, MODELS, SETTINGS, System, kill_engine, kill_worker, until
from tests.waiting import slowness

NUM_JOBS, NUM_TOKENS = 8, 400
NUM_CHUNKS = 4  # that every stream has shown between two strikes
FINISH_SECONDS = 200.0  # a strike at the worker costs eight seconds of CPU for the imports alone

Strike = Callable[[System], None]


def drain_worker(system: System) -> None:
    system.plant.workers[0].send(signal.SIGTERM)


STRIKES: list[Strike] = [kill_worker, kill_engine, drain_worker]


@pytest.fixture
def system() -> Iterator[System]:
    folder = Path(tempfile.mkdtemp(prefix="celeriac-kills-"))
    shutil.copytree(ROOT / "models" / MODEL, folder / MODEL)
    # Drained in less than the jobs take, so they are given back; and small chunks, however busy the machine is.
    settings = SETTINGS | {"drain_seconds": 0.1, "flush_max_seconds": 0.1}
    plant = Plant(folder, models=MODELS, worker_models={"gpu-1": MODEL}, settings=settings, start=start_prepared)
    with System(plant) as system:
        yield system
    shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class Brought:
    """What one job ended with, and the attempts that it took."""

    text: str
    token_ids: list[int]
    attempt: int


async def run_jobs(system: System, strikes: Sequence[Strike]) -> list[History]:
    """All jobs followed to their ends, while the strikes fall one after another, each when all streams went on."""
    clients = Clients(system.plant.api_urls, seed=1)
    params = {"max_tokens": NUM_TOKENS, "ignore_eos": True, "temperature": 0, "seed": 1}
    prompts = [f"Once upon a time there were {number} little boats" for number in range(NUM_JOBS)]
    histories = [clients.plan({"model": MODEL, "prompt": prompt, "params": params}) for prompt in prompts]
    try:
        async with asyncio.timeout(FINISH_SECONDS * slowness()), asyncio.TaskGroup() as group:
            for history in histories:
                assert await clients.submit(history)
                group.create_task(clients.follow(history))
            for strike in strikes:
                seen = [history.last_number() for history in histories]
                await until(partial(_have_all_gone_on, histories, seen))
                strike(system)
    finally:
        await clients.close()
    return histories


def _have_all_gone_on(histories: Sequence[History], seen: Sequence[int]) -> bool:
    assert not any(history.ends_seen for history in histories), "a job ended before the last strike"
    pairs = zip(histories, seen, strict=True)
    return all(history.last_number() >= number + NUM_CHUNKS for history, number in pairs)


def brought(system: System, strikes: Sequence[Strike]) -> list[Brought]:
    """By job, after every stream was compared with what is stored."""
    histories = asyncio.run(run_jobs(system, strikes))
    with system.plant.connect() as connection:
        verdict = judge(histories, read_stored(connection))
        chunks = connection.execute(
            "SELECT job_id, chunk->>'token_ids' FROM job_chunks ORDER BY job_id, sequence_number"
        ).fetchall()
    assert verdict.violations == []
    assert verdict.figures["jobs_by_status"] == {"completed": NUM_JOBS}
    system.forget_all_jobs()
    token_ids_by_id: dict[object, list[int]] = {}
    for job_id, token_ids in chunks:
        token_ids_by_id.setdefault(job_id, []).extend(json.loads(str(token_ids)))
    ends = [(history.end or {}, parse_id(history.job_id or "")) for history in histories]
    return [Brought(end["output"]["text"], token_ids_by_id[id_], end["attempt"]) for end, id_ in ends]


@pytest.mark.slow
def test_greedy_text_after_three_kills_is_the_text_without_any(system: System) -> None:
    undisturbed = brought(system, [])
    disturbed = brought(system, STRIKES)
    assert [len(job.token_ids) for job in undisturbed] == [NUM_TOKENS] * NUM_JOBS
    assert [(job.text, job.token_ids) for job in disturbed] == [(job.text, job.token_ids) for job in undisturbed]
    assert [job.attempt for job in undisturbed] == [1] * NUM_JOBS
    assert [job.attempt for job in disturbed] == [1 + len(STRIKES)] * NUM_JOBS
