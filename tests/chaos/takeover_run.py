"""How long jobs stand still when what runs them is killed and nothing else goes wrong.

    python -m tests.chaos.takeover_run --engine-kills 10 --worker-kills 10

Long jobs of the fake model are streamed from three workers with room to spare. One engine process after another is
killed, its worker alive; then one worker after another, which is started again only once its jobs run elsewhere.
Settings are those that are shipped. For each job that ran there, measured is the time from the kill to its next claim
in SQL and to the first chunk of the new attempt that its reader sees. A kill comes only when no job is suspected of the
one before: a suspect of two runs alone, which is another matter. The last line is JSON.
"""

import argparse
import asyncio
import itertools
import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

from domain.jobs import parse_id
from storage.job_statements import PROVEN_TOKENS
from tests.chaos import audit
from tests.chaos.checker import judge, percentiles, read_stored
from tests.chaos.clients import Clients, History
from tests.chaos.plant import Part, Plant

MODEL = "fake"
MODELS = f"""
[[models]]
id = "{MODEL}"
path = "none"
backend = "fake"
max_model_len = 4096
max_num_seqs = 8
[models.fake]
step_seconds = 0.05
chained = true
"""
SETTINGS = {"max_failures": 100}
NUM_CLIENTS = 12
NUM_TOKENS = 2000  # of a job: about two minutes
PATIENCE_SECONDS = 60.0
LOOK_SECONDS = 0.02


@dataclass(slots=True)
class Kill:
    """`job_ids` are the jobs that ran there."""

    at: float
    job_ids: list[UUID]
    claims: list[float] = field(default_factory=list)  # seconds until each was claimed again
    chunks: list[float] = field(default_factory=list)  # seconds until its reader saw more


class TakeoverRun:
    """`figures` is what it comes to. Raises TimeoutError where a job is not taken over at all."""

    def __init__(self, plant: Plant, clients: Clients) -> None:
        self._plant = plant
        self._clients = clients
        self._is_over = False
        self._histories: dict[UUID, History] = {}
        self._num_kills = dict.fromkeys(plant.workers, 0)

    async def run(self, *, num_engine_kills: int, num_worker_kills: int) -> dict[str, Any]:
        watching = asyncio.create_task(self._watch())
        working = [asyncio.create_task(self._be_a_client(number)) for number in range(NUM_CLIENTS)]
        engine_kills, worker_kills = [], []
        try:
            for _ in range(num_engine_kills):
                engine_kills.append(await self._kill(kill_engine, is_held=False))
            for _ in range(num_worker_kills):
                worker_kills.append(await self._kill(Part.kill, is_held=True))
        finally:
            self._is_over = True
            for history in list(self._histories.values()):
                await self._clients.cancel(history)
            await asyncio.gather(*working)
            watching.cancel()
        return {"engine": _figures(engine_kills), "worker": _figures(worker_kills)}

    async def _watch(self) -> None:
        while True:
            self._plant.watch()
            await asyncio.sleep(LOOK_SECONDS)

    async def _be_a_client(self, number: int) -> None:
        """One long job after another, each streamed."""
        for turn in itertools.count():
            if self._is_over:
                return
            params = {"max_tokens": NUM_TOKENS, "seed": 1000 * turn + number}
            history = self._clients.plan({"model": MODEL, "prompt": f"job {turn} of {number}", "params": params})
            if await self._clients.submit(history):
                assert history.job_id is not None
                self._histories[parse_id(history.job_id)] = history
                await self._clients.follow(history)

    async def _kill(self, strike: Callable[[Part], None], *, is_held: bool) -> Kill:
        """Once all jobs run unsuspected; returns when those that were struck go on, and their worker is there again."""
        await self._until(self._are_all_proven)
        able = [part for part in self._plant.workers if self._running(part)]
        part = min(able, key=lambda part: self._num_kills[part])  # one that crashes too often gives itself up
        self._num_kills[part] += 1
        part.is_held = is_held
        kill = Kill(time.time(), self._running(part))
        strike(part)
        await self._until(lambda: all(self._goes_on(job_id, kill) for job_id in kill.job_ids))
        seen = [self._first_chunk(job_id, kill) for job_id in kill.job_ids]
        kill.chunks = [at - kill.at for at in seen if at is not None]
        kill.claims = await asyncio.to_thread(self._claims_after, kill)
        print(f"{part.name} {_describe(kill)}", flush=True)
        part.is_held = False
        await asyncio.to_thread(self._plant.wait_until_ready)
        await self._until(lambda: part.engine_pid() is not None)
        return kill

    def _are_all_proven(self) -> bool:
        """Every client's job runs, and has brought enough in its attempt to be no suspect."""
        with self._plant.connect() as connection:
            rows = connection.execute(
                "SELECT count(*) FROM jobs WHERE status = 'in_progress' AND num_suspicions = 0"
                " AND num_committed_tokens >= num_tokens_at_claim + %s",
                [PROVEN_TOKENS],
            ).fetchall()
        return rows == [(NUM_CLIENTS,)]

    def _running(self, part: Part) -> list[UUID]:
        """The jobs of this worker."""
        with self._plant.connect() as connection:
            rows = connection.execute(
                "SELECT id FROM jobs WHERE status = 'in_progress' AND lease_owner ="
                " (SELECT id FROM chaos_workers WHERE name = %s ORDER BY at DESC LIMIT 1)",
                [part.name],
            ).fetchall()
        return [UUID(str(id_)) for (id_,) in rows]

    def _goes_on(self, job_id: UUID, kill: Kill) -> bool:
        """Or had just ended."""
        return self._histories[job_id].ended_at is not None or self._first_chunk(job_id, kill) is not None

    def _first_chunk(self, job_id: UUID, kill: Kill) -> float | None:
        """When its reader saw the first chunk of the attempt after the kill."""
        last = self._last_before(job_id, kill)
        if last is None:
            return None
        connections = list(self._histories[job_id].connections)
        return next((delta.at for c in connections for delta in list(c.deltas) if delta.number > last), None)

    def _last_before(self, job_id: UUID, kill: Kill) -> int | None:
        """The number of the last chunk that the killed attempt still committed; None until another has begun."""
        with self._plant.connect() as connection:
            rows = connection.execute(
                "SELECT committed FROM takeover_claims WHERE job_id = %s AND at > %s ORDER BY at LIMIT 1",
                [job_id, kill.at],
            ).fetchall()
        return int(str(rows[0][0])) if rows else None

    def _claims_after(self, kill: Kill) -> list[float]:
        with self._plant.connect() as connection:
            rows = connection.execute(
                "SELECT min(at) FROM takeover_claims WHERE job_id = ANY(%s) AND at > %s GROUP BY job_id",
                [kill.job_ids, kill.at],
            ).fetchall()
        return [float(str(at)) - kill.at for (at,) in rows]

    async def _until(self, is_true: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not await asyncio.to_thread(is_true):  # noqa: ASYNC110  (it is SQL that is asked, which sets no event)
                await asyncio.sleep(LOOK_SECONDS)


#: How far a job was when an attempt at it began.
CLAIMS = """
CREATE TABLE takeover_claims (job_id uuid, at double precision, committed int);
CREATE FUNCTION takeover_note_claim() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    INSERT INTO takeover_claims
    VALUES (new.id, extract(epoch FROM clock_timestamp()), new.committed_sequence_number);
    RETURN new;
END $$;
CREATE TRIGGER takeover_claim AFTER UPDATE OF status ON jobs FOR EACH ROW
    WHEN (new.status = 'in_progress' AND old.status = 'queued') EXECUTE FUNCTION takeover_note_claim();
"""


def kill_engine(part: Part) -> None:
    pid = part.engine_pid()
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


def _describe(kill: Kill) -> str:
    claims, chunks = percentiles(kill.claims), percentiles(kill.chunks)
    return f"{len(kill.job_ids)} jobs: claimed after {claims}, seen after {chunks}"


def _figures(kills: Sequence[Kill]) -> dict[str, Any]:
    return {
        "kills": len(kills),
        "jobs": sum(len(kill.job_ids) for kill in kills),
        "to_claim": percentiles(second for kill in kills for second in kill.claims),
        "to_chunk": percentiles(second for kill in kills for second in kill.chunks),
    }


async def run(*, num_engine_kills: int, num_worker_kills: int) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp(prefix="celeriac-takeover-"))
    worker_models = dict.fromkeys(("gpu-1", "gpu-2", "gpu-3"), MODEL)
    with Plant(folder, models=MODELS, worker_models=worker_models, settings=SETTINGS) as plant:
        await asyncio.to_thread(plant.start_servers)
        with plant.connect() as connection:
            audit.install(connection)
            connection.execute(CLAIMS)
        plant.start_parts()
        await asyncio.to_thread(plant.wait_until_ready)
        clients = Clients(plant.api_urls)
        try:
            takeovers = TakeoverRun(plant, clients)
            figures = await takeovers.run(num_engine_kills=num_engine_kills, num_worker_kills=num_worker_kills)
        finally:
            await clients.close()
        with plant.connect() as connection:
            verdict = judge(clients.histories, read_stored(connection))
    if verdict.violations:
        print(f"the logs are in {folder / 'logs'}")
    else:
        shutil.rmtree(folder, ignore_errors=True)
    return {"ok": not verdict.violations, **figures, "violations": verdict.num_by_kind()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine-kills", type=int, default=10)
    parser.add_argument("--worker-kills", type=int, default=10)
    given = parser.parse_args()
    print(json.dumps(asyncio.run(run(num_engine_kills=given.engine_kills, num_worker_kills=given.worker_kills))))


if __name__ == "__main__":
    main()
