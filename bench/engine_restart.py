"""Measures the time from an engine's SIGKILL to the next one's first token: `python -m bench.engine_restart`.

The ceiling is an engine that is already running. Then come the first start, including imports, and the restarts, each
with a job waiting for it. CPU seconds are the engine's own up to that token. Memory is the proportional set size of a
process: a page that two of them share counts half for each. Prints all of this, then one JSON line.
"""

import argparse
import json
import os
import platform
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil

from domain.catalog import Catalog
from gpu_worker.engine_process.frames import AddJob, Report, StepDone
from gpu_worker.engine_process.supervisor import Supervisor
from settings import get_settings
from text.models import complete

PROMPT_TOKEN_IDS = list(range(100, 110))
PARAMS: dict[str, object] = {"seed": 1}
POLL_SECONDS = 0.005


@dataclass(frozen=True, slots=True)
class FirstToken:
    """The time to a first token; `cpu_seconds` counts from the engine's start."""

    wall_seconds: float
    cpu_seconds: float


class Crank:
    """Turns a supervisor as the runner's thread does."""

    def __init__(self, model: str) -> None:
        spec = complete(Catalog.load(get_settings().models_file).get(model))
        self.supervisor = Supervisor(spec, heartbeat_seconds=5.0)
        self._reports: list[Report] = []
        self._num_jobs = 0

    def first_token(self) -> FirstToken:
        """The first token of a new job, which waits for the engine if there is none."""
        started = time.perf_counter()
        self._turn_until(lambda: self.supervisor.ready is not None)
        self._reports.clear()
        self._add()
        self._turn_until(lambda: any(isinstance(report, StepDone) and report.outputs for report in self._reports))
        wall_seconds = time.perf_counter() - started
        times = psutil.Process(self._engine_pid).cpu_times()
        return FirstToken(wall_seconds, times.user + times.system)

    def restart(self) -> FirstToken:
        started = time.perf_counter()
        os.kill(self._engine_pid, signal.SIGKILL)
        while self.supervisor.watch(time.monotonic()) is None:
            self.supervisor.receive()
            time.sleep(POLL_SECONDS)
        self.supervisor.plan_restart(num_crashes_before=0)
        until_known = time.perf_counter() - started
        first = self.first_token()
        return FirstToken(until_known + first.wall_seconds, first.cpu_seconds)

    @property
    def _engine_pid(self) -> int:
        assert self.supervisor.ready is not None
        return self.supervisor.ready.pid

    def _add(self) -> None:
        self._num_jobs += 1
        self.supervisor.send(
            AddJob(
                job_id=f"job_{self._num_jobs}",
                attempt=1,
                prompt_token_ids=PROMPT_TOKEN_IDS,
                params=PARAMS,
                max_tokens=1,
                seed=1,
                priority=0,
                cache_salt="",
                committed_token_ids=[[]],
                num_emitted_chars=[0],
                finished_indexes=[],
            )
        )

    def _turn_until(self, is_true: Callable[[], bool]) -> None:
        while not is_true():
            self._reports += self.supervisor.receive()
            assert self.supervisor.watch(time.monotonic()) is None, "the engine crashed by itself"
            time.sleep(POLL_SECONDS)


@contextmanager
def make_crank(model: str) -> Iterator[Crank]:
    crank = Crank(model)
    try:
        yield crank
    finally:
        crank.supervisor.stop()


def show(name: str, firsts: list[FirstToken]) -> dict[str, float]:
    wall = sorted(first.wall_seconds for first in firsts)
    cpu = statistics.median(first.cpu_seconds for first in firsts)
    print(f"  {name:32} wall p50 {statistics.median(wall):6.2f}   longest {wall[-1]:6.2f} s", end="")
    print(f"   engine's CPU so far {cpu:5.2f} s   load {os.getloadavg()[0]:.1f}", flush=True)
    return {"p50_s": round(statistics.median(wall), 3), "max_s": round(wall[-1], 3), "cpu_s": round(cpu, 2)}


def show_memory() -> list[float]:
    """Print the memory of this process's descendants in MB, parents first."""
    family = psutil.Process().children(recursive=True)
    sizes = [round(process.memory_full_info().pss / 1e6, 1) for process in family]
    print(f"  memory, parents first: {sizes} MB")
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="celeriac-mini")
    parser.add_argument("--kills", type=int, default=10)
    given = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {given.model}")
    figures: dict[str, object] = {"bench": "engine_restart"}
    with make_crank(given.model) as crank:
        first_start = crank.first_token()
        figures["ceiling"] = show("ceiling: an engine that is there", [crank.first_token() for _ in range(10)])
        figures["first_start"] = show("first start", [first_start])
        figures["restart"] = show("restart after SIGKILL", [crank.restart() for _ in range(given.kills)])
        figures["memory_mb"] = show_memory()
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
