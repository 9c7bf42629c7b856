"""Measures the CPU of everything but the engine, for each token and when nothing runs: `python -m bench.token_cost`.

One API, one worker with the fake engine, maintenance, PostgreSQL and Redis, as `celeriac up` starts them. First nothing
runs, then 32 clients stream completions of 64 tokens from 16 slots, with steps as long as those of a small model on two
cores. An engine on the same cores loses to the others what they take. Ceiling: nothing taken at all. Prints the share
of a core of each process when idle, its milliseconds for each token, how much of the slots' time was used (of 100 per
cent, the rest passes between a job's end and the next one's start), and one line of JSON.

CPU time hardly depends on what else the machine does. `--against FOLDER` measures the source tree in FOLDER, an earlier
one, at the same time, and prints the ratios.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil

from local.lifetime import ending_with_us
from settings import ROOT
from tests.chaos.plant import Plant

NUM_CLIENTS, NUM_SLOTS = 32, 16
SETTLE_SECONDS = 8.0  # after the start, and until all slots are taken
BODY = {"model": "bench", "prompt": "Once upon a time", "max_tokens": 64, "ignore_eos": True, "stream": True}
BODY |= {"stream_options": {"include_usage": True}}

Seconds = Mapping[str, float]


class MeasuredSystem:
    """One source tree, running."""

    def __init__(self, root: Path, folder: Path, step_seconds: float) -> None:
        models = '[[models]]\nid = "bench"\npath = "none"\nbackend = "fake"\nmax_model_len = 512\n'
        models += f"max_num_seqs = {NUM_SLOTS}\nfake = {{ step_seconds = {step_seconds} }}\n"
        self.plant = Plant(folder, models=models, worker_models={"bench": "bench"}, root=root)
        self.step_seconds = step_seconds
        self._client: subprocess.Popen[bytes] | None = None

    @contextmanager
    def running(self) -> Iterator[None]:
        try:
            self.plant.start_servers()
            self.plant.start_parts()
            self.plant.wait_until_ready()
            yield
        finally:
            if self._client is not None:
                self._client.kill()
                self._client.wait()
            self.plant.close()

    def begin_streaming(self) -> None:
        arguments = [self.plant.api_urls[0], json.dumps(BODY), str(NUM_CLIENTS)]
        command = ending_with_us([sys.executable, "-m", "bench.stream_client", *arguments])
        self._client = subprocess.Popen(command, cwd=ROOT)

    def num_tokens(self) -> int:
        """Committed so far."""
        with self.plant.connect() as connection:
            row = connection.execute("SELECT sum(num_committed_tokens)::int FROM jobs").fetchone()
        return int(str(row[0] or 0)) if row else 0

    def cpu_seconds(self) -> Seconds:
        """Of each kind of process since its start; the engine's and its template's count as the engine."""
        plant = self.plant
        seconds = {
            "API": _of(plant.apis[0].pid),
            "worker": _of(plant.workers[0].pid),
            "maintenance": _of(plant.maintenance[0].pid),
            "PostgreSQL": sum(map(_of, plant.pids_of(plant.postgres))) + _of_ended(plant.postgres.pid),
            "Redis": _of(plant.redis.pid),
        }
        return seconds if self._client is None else seconds | {"client": _of(self._client.pid)}


def _of(pid: int | None) -> float:
    try:
        return sum(psutil.Process(pid).cpu_times()[:2])
    except psutil.NoSuchProcess:
        return 0.0


def _of_ended(pid: int | None) -> float:
    """Of the children that have ended."""
    return sum(psutil.Process(pid).cpu_times()[2:4])


def measure(systems: Mapping[str, MeasuredSystem], seconds: float) -> dict[str, tuple[Seconds, int, float]]:
    """By name: what each kind of process took, how many tokens were committed, how long it was."""
    before = {name: (system.cpu_seconds(), system.num_tokens(), time.monotonic()) for name, system in systems.items()}
    time.sleep(seconds)
    taken: dict[str, tuple[Seconds, int, float]] = {}
    for name, system in systems.items():
        cpu, tokens, at = before[name]
        now = system.cpu_seconds()
        taken[name] = {kind: now[kind] - cpu[kind] for kind in cpu}, system.num_tokens() - tokens, time.monotonic() - at
    return taken


def figures_of(systems: Mapping[str, MeasuredSystem], seconds: float) -> dict[str, dict[str, dict[str, float]]]:
    """By name: per cent of a core when idle, and milliseconds for each token."""
    time.sleep(SETTLE_SECONDS)
    idle = measure(systems, seconds)
    for system in systems.values():
        system.begin_streaming()
    time.sleep(SETTLE_SECONDS)
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for name, (cpu, tokens, loaded_seconds) in measure(systems, seconds).items():
        idle_cpu, _, idle_seconds = idle[name]
        figures[name] = {
            "idle_percent": {kind: 100 * value / idle_seconds for kind, value in idle_cpu.items()},
            "ms_per_token": {kind: 1000 * value / tokens for kind, value in cpu.items()},
        }
        for values in figures[name].values():
            values["together"] = sum(values.values())
        used = tokens * systems[name].step_seconds / loaded_seconds / NUM_SLOTS
        figures[name]["slots"] = {"used_percent": 100 * used}
    return figures


def show(figures: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    for what in ("idle_percent", "ms_per_token", "slots"):
        print(f"\n{what:14}", *(f"{name:>10}" for name in figures), "ratio" if len(figures) == 2 else "")
        for kind in figures["this"][what]:
            values = [by_what[what][kind] for by_what in figures.values()]
            ratio = f"{values[0] / values[1]:.2f}" if len(values) == 2 and values[1] else ""
            print(f"{kind:14}", *(f"{value:10.3f}" for value in values), ratio)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0, help="of each of the two measurements")
    parser.add_argument("--step-seconds", type=float, default=0.15)
    parser.add_argument("--against", type=Path, help="another source tree, measured at the same time")
    given = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(f"load {os.getloadavg()[0]:.1f}; ceiling: 0 ms for each token, since the engine needs all cores", flush=True)
    roots = {"this": ROOT} | ({"other": given.against.resolve()} if given.against else {})
    with ExitStack() as stack:
        systems = {}
        for name, root in roots.items():
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="celeriac-bench-")))
            systems[name] = MeasuredSystem(root, folder, given.step_seconds)
            stack.enter_context(systems[name].running())
        figures = figures_of(systems, given.seconds)
    show(figures)
    rounded = {n: {w: {k: round(v, 3) for k, v in vs.items()} for w, vs in by.items()} for n, by in figures.items()}
    print(json.dumps({"bench": "token_cost", "load": round(os.getloadavg()[0], 1), **rounded}))


if __name__ == "__main__":
    main()
