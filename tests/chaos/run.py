"""A chaos run: the whole system as real processes, a load, and a seeded schedule of faults; then the verdict.

    python -m tests.chaos.run --seconds 60 --seed 1
    python -m tests.chaos.run --pooler transaction       # with a PgBouncer before PostgreSQL, which is killed, too

The seed gives the schedule, which is printed first, and what the clients do. The last line is JSON; the exit code is 0
only where nothing was violated. The logs of a run that found something are kept.
"""

import argparse
import asyncio
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psycopg
from rich.console import Console
from rich.live import Live

from gpu_worker.engine.fake_tokens import num_drawn_tokens
from settings import ROOT
from tests.chaos import audit, stalls
from tests.chaos.clients import Clients
from tests.chaos.faults import POOLER_WEIGHTS, WEIGHTS, Fault, Striker, make_schedule
from tests.chaos.mutants import MUTANTS
from tests.chaos.plant import Plant, host_and_port, start_prepared, start_python
from tests.chaos.proxy import Link
from tests.chaos.trees import Edit, copy_tree
from tests.chaos.verdict import REAL_WORKER, judge_run
from tests.chaos.workload import FAKE_MODEL, MODELS, REAL_MODEL, REAL_MODELS, Workload, describe
from tests.pooler import Pooler

LEASE_SECONDS = 3.0
SETTINGS = {
    "lease_seconds": LEASE_SECONDS,
    "lease_grace_seconds": 0.5,
    "janitor_interval_seconds": 0.5,
    "engine_heartbeat_seconds": 1,
    "drain_seconds": 2,
    "api_drain_seconds": 1,
    "max_failures": 30,
    "max_poison_jobs_per_hour": 1000,  # beyond it all jobs would run alone, as there is one tenant
    "flush_min_seconds": 0.02,
    "flush_max_seconds": 0.08,  # more chunks than the default gives, so more that can go wrong
}
REST_LOOK_SECONDS = 0.3
NUM_SHOWN = 20  # violations
COUNT_FOLDER = "drawn"  # of the tokens that the fake engines drew


@dataclass(frozen=True)
class Options:
    seconds: float = 60.0
    seed: int = 1
    faults_per_minute: float = 19.0
    num_clients: int = 40
    num_apis: int = 3
    num_workers: int = 3
    has_real_model: bool = True
    max_tokens: int = 400  # of a job of the fake model
    quiet_seconds: float = 90.0  # after the last fault; what is not over by then is stuck
    is_kept: bool = False  # the folder with the logs, also where all is well
    pool_mode: str = ""  # of a PgBouncer before PostgreSQL; empty: there is none
    edits: tuple[Edit, ...] = ()  # that make a mutant of the code
    weights: Mapping[str, float] = field(default_factory=lambda: WEIGHTS)
    schedule: tuple[Fault, ...] = ()  # instead of one that is drawn
    is_prepared: bool = False  # processes are forks of one that has imported this tree; else they run a copy of it


class Run:
    """One run; `report` is what it comes to."""

    def __init__(self, options: Options, console: Console) -> None:
        self._options = options
        self._console = console
        self._folder = Path(tempfile.mkdtemp(prefix="celeriac-chaos-"))
        worker_models = {f"gpu-{number}": FAKE_MODEL for number in range(1, options.num_workers + 1)}
        models = MODELS.format(count_folder=self._folder / COUNT_FOLDER)
        if options.has_real_model:
            worker_models[REAL_WORKER] = REAL_MODEL
            model_folder = self._folder / REAL_MODEL  # a copy: the same weights to the end, whatever is trained here
            shutil.copytree(ROOT / "models" / REAL_MODEL, model_folder)
            models += REAL_MODELS.format(id=REAL_MODEL, path=model_folder)
        self._plant = Plant(
            self._folder,
            models=models,
            worker_models=worker_models,
            num_apis=options.num_apis,
            settings=SETTINGS,
            root=ROOT if options.is_prepared else copy_tree(self._folder / "tree", options.edits),
            start=start_prepared if options.is_prepared else start_python,
        )
        self._links: dict[str, Link] = {}
        self._pooler: Pooler | None = None
        self._phase = "starting"
        self._began_at = time.monotonic()

    async def run(self) -> dict[str, Any]:
        schedule = self._options.schedule or make_schedule(
            self._options.seed,
            seconds=self._options.seconds,
            per_minute=self._options.faults_per_minute,
            weights=POOLER_WEIGHTS if self._options.pool_mode else self._options.weights,
        )
        self._console.print(f"seed {self._options.seed}, {len(schedule)} faults (seconds, kind, choice/size):")
        self._console.print(describe(schedule), soft_wrap=True, highlight=False)
        try:
            async with AsyncExitStack() as stack:
                await self._start(stack)
                clients = Clients(self._plant.api_urls, seed=self._options.seed)
                stack.push_async_callback(clients.close)
                striker = Striker(self._plant, self._links, LEASE_SECONDS, self._has_isolated, self._pooler)
                await self._live_through(clients, striker, schedule)
                report = await asyncio.to_thread(self._judge, clients, striker)
        finally:
            await asyncio.to_thread(self._plant.close)
        if report["ok"] and not self._options.is_kept:
            shutil.rmtree(self._folder, ignore_errors=True)
        return report

    # The system

    async def _start(self, stack: AsyncExitStack) -> None:
        await asyncio.to_thread(self._plant.start_servers)
        with self._plant.connect() as connection:
            audit.install(connection)
            stalls.install(connection)
        await asyncio.to_thread(self._plant.restart_postgres)
        postgres: Path | tuple[str, int] = Path(self._plant.postgres.url.partition("host=")[2]) / ".s.PGSQL.5432"
        if self._options.pool_mode:
            self._pooler = Pooler(self._plant.postgres.url_of(self._plant.postgres.database), self._options.pool_mode)
            await asyncio.to_thread(stack.enter_context, self._pooler)
            postgres = ("127.0.0.1", self._pooler.port)
        for group in ("api", "gpu", "maintenance"):
            for server, upstream in (("postgres", postgres), ("redis", host_and_port(self._plant.redis.url))):
                link = Link(f"{group} to {server}", upstream)
                self._links[link.name] = await stack.enter_async_context(link)
        self._plant.start_parts(database_url=self._database_url, redis_url=self._redis_url)
        await asyncio.to_thread(self._plant.wait_until_ready)

    def _database_url(self, name: str) -> str:
        port = self._link(name, "postgres").port
        options = f"application_name={name}&sslmode=disable&gssencmode=disable"
        if self._options.pool_mode == "transaction":
            options += "&pool_mode=transaction"
        return f"postgresql://postgres@127.0.0.1:{port}/{self._plant.postgres.database}?{options}"

    def _redis_url(self, name: str) -> str:
        _, port = host_and_port(self._plant.redis.url)
        return self._plant.redis.url.replace(f":{port}/", f":{self._link(name, 'redis').port}/")

    def _link(self, name: str, server: str) -> Link:
        """What stands between a part and a server: one for all of its group."""
        group, _, _ = name.partition("-")
        return self._links[f"{group} to {server}"]

    def _has_isolated(self, name: str) -> bool:
        """Does not wait for a database that is away: then it says yes."""
        try:
            with psycopg.connect(self._plant.postgres.url, connect_timeout=1, options="-c statement_timeout=500") as c:
                names = "SELECT id FROM chaos_workers WHERE name = %s"
                sql = f"SELECT count(*) FROM jobs WHERE lane = 'isolated' AND lease_owner IN ({names})"
                row = c.execute(sql, [name]).fetchone()
        except psycopg.Error:
            return True
        return row is None or row[0] > 0

    # The run

    async def _live_through(self, clients: Clients, striker: Striker, schedule: Sequence[Fault]) -> None:
        workload = Workload(
            clients,
            num_clients=self._options.num_clients,
            seed=self._options.seed,
            has_real_model=self._options.has_real_model,
            max_tokens=self._options.max_tokens,
        )
        watching = asyncio.create_task(self._watch(clients, striker, workload))
        working = asyncio.create_task(workload.run())
        try:
            self._phase, ends_at = "faults", time.monotonic() + self._options.seconds
            await striker.run(schedule)
            await asyncio.sleep(max(0.0, ends_at - time.monotonic()))
            self._phase = "quiet"
            self._mend()
            workload.stop()
            with suppress(TimeoutError):
                await asyncio.wait_for(working, self._options.quiet_seconds)
            await self._wait_for_rest()
        finally:
            watching.cancel()
            working.cancel()
            await asyncio.gather(watching, working, return_exceptions=True)

    def _mend(self) -> None:
        for link in self._links.values():
            link.mend()
        for part in self._plant.parts:
            part.resume()

    async def _wait_for_rest(self) -> None:
        """Jobs that no client waits for (a submission whose answer was lost) end too."""
        for _ in range(int(self._options.quiet_seconds / REST_LOOK_SECONDS)):
            if not await asyncio.to_thread(self._num_open):
                return
            await asyncio.sleep(REST_LOOK_SECONDS)

    def _num_open(self) -> int:
        with self._plant.connect() as connection:
            row = connection.execute("SELECT count(*) FROM jobs WHERE finished_at IS NULL").fetchone()
        assert row is not None
        return int(str(row[0]))

    async def _watch(self, clients: Clients, striker: Striker, workload: Workload) -> None:
        """Restart the dead, and say how it goes."""
        printed_at = 0.0
        with Live(console=self._console, refresh_per_second=4, transient=True) as live:
            while True:
                self._plant.watch()
                line = self._progress(clients, striker, workload)
                live.update(line)
                if not self._console.is_terminal and time.monotonic() - printed_at > 15:
                    printed_at = time.monotonic()
                    self._console.print(line, highlight=False)
                await asyncio.sleep(0.05)

    def _progress(self, clients: Clients, striker: Striker, workload: Workload) -> str:
        num_accepted = sum(history.job_id is not None for history in clients.histories)
        num_faults = sum(bool(fault.target) for fault in striker.struck)
        seconds = time.monotonic() - self._began_at
        last = striker.struck[-1].kind if striker.struck else "none yet"
        return (
            f"{seconds:5.0f} s  {self._phase:8} {num_accepted} accepted, {workload.num_ended} ended, "
            f"{clients.num_reconnects} reconnects, {num_faults} faults, last: {last}"
        )

    # The verdict

    def _judge(self, clients: Clients, striker: Striker) -> dict[str, Any]:
        verdict = judge_run(
            self._plant,
            clients.histories,
            striker.struck,
            lease_seconds=LEASE_SECONDS,
            drawn=num_drawn_tokens(self._folder / COUNT_FOLDER),
        )
        for violation in verdict.violations[:NUM_SHOWN]:
            self._console.print(f"{violation.kind}: {violation.job}: {violation.detail}", markup=False)
        if verdict.violations or self._options.is_kept:
            self._keep(striker)
        return {
            "ok": not verdict.violations,
            "seed": self._options.seed,
            "seconds": self._options.seconds,
            "violations": verdict.num_by_kind(),
            **verdict.figures,
        }

    def _keep(self, striker: Striker) -> None:
        """What the tables, which stay in the folder with the logs, do not know."""
        parts = {part.name: [incarnation.times for incarnation in part.incarnations] for part in self._plant.parts}
        faults = [asdict(fault) for fault in striker.struck]
        (self._folder / "faults.json").write_text(json.dumps({"faults": faults, "parts": parts}, indent=1))
        self._console.print(f"logs, tables and faults are in {self._folder}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=Options.seconds)
    parser.add_argument("--seed", type=int, help="default: drawn, and printed")
    parser.add_argument("--faults-per-minute", type=float, default=Options.faults_per_minute)
    parser.add_argument("--clients", type=int, default=Options.num_clients, dest="num_clients")
    parser.add_argument(
        "--max-tokens", type=int, default=Options.max_tokens, help="of a job; longer ones have more chunks"
    )
    parser.add_argument("--without-real-model", action="store_false", dest="has_real_model")
    parser.add_argument("--pooler", choices=["session", "transaction"], default="", dest="pool_mode")
    parser.add_argument("--mutant", choices=list(MUTANTS), help="run the code without one of its rules")
    parser.add_argument("--keep", action="store_true", dest="is_kept", help="keep the logs and the tables")
    arguments = vars(parser.parse_args())
    if arguments["seed"] is None:
        arguments["seed"] = random.SystemRandom().randrange(1_000_000)
    mutant = MUTANTS.get(arguments.pop("mutant") or "")
    if mutant is not None:
        arguments |= {"edits": mutant.edits, "weights": mutant.weights, "num_apis": 1, "has_real_model": False}
    console = Console(width=160 if not sys.stdout.isatty() else None)
    report = asyncio.run(Run(Options(**arguments), console).run())
    print(json.dumps(report))
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
