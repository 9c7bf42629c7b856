"""What more workers give: the same jobs through one worker and through several, below the machine's saturation.

    python -m bench.scaling                 # one, two and four workers: two minutes

The engine is the fake one, whose steps sleep as a GPU's would compute: a worker is bounded by its slots and the length
of a step, and takes next to no CPU. So the ratio tells what PostgreSQL, Redis, claims and commits add, and nothing of
engines. Several APIs are compared by `python -m bench.api_costs --processes 2`, in CPU: one is bounded by its core, and
what a machine with two cores has left beside it is not a second one. The ceiling is the product of workers, slots and
steps. The last line is JSON.
"""

import argparse
import json
import os
import platform
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.chaos.plant import Plant
from tests.waiting import wait_until

MODEL, NUM_SLOTS, STEP_SECONDS, NUM_TOKENS = "fake", 16, 0.025, 80
MODELS = f"""
[[models]]
id = "{MODEL}"
path = "none"
backend = "fake"
max_model_len = 4096
max_num_seqs = {NUM_SLOTS}
[models.fake]
step_seconds = {STEP_SECONDS}
"""
JOBS_PER_SECOND = NUM_SLOTS / (STEP_SECONDS * NUM_TOKENS)  # of a worker, at best


def measure(num_workers: int, seconds: float) -> dict[str, Any]:
    """Jobs a second while all slots are full, over `seconds` of work for that many workers."""
    folder = Path(tempfile.mkdtemp(prefix="celeriac-scaling-"))
    folder.chmod(0o755)
    workers = {f"gpu-{number}": MODEL for number in range(1, num_workers + 1)}
    num_jobs = round(JOBS_PER_SECOND * num_workers * seconds)
    with Plant(folder, models=MODELS, worker_models=workers, settings={"auth": "none"}) as plant:
        plant.start_servers()
        plant.start_parts()
        plant.wait_until_ready()
        with httpx.Client(base_url=plant.api_urls[0], timeout=60) as http:
            body = {"model": MODEL, "prompt": "A story", "params": {"max_tokens": NUM_TOKENS, "ignore_eos": True}}
            began_at, cpu_before = time.monotonic(), _cpu_seconds(plant)
            for _ in range(num_jobs):
                http.post("/v1/jobs", json=body).raise_for_status()
        with plant.connect() as connection:

            def num_open() -> int:
                row = connection.execute("SELECT count(*) FROM jobs WHERE finished_at IS NULL").fetchone()
                assert row is not None
                return int(str(row[0]))

            wait_until(lambda: num_open() == 0, "all jobs have ended", seconds=10 * seconds, pause_seconds=0.05)
            wall_seconds = time.monotonic() - began_at
            statement = (
                "SELECT extract(epoch FROM max(finished_at) - min(started_at))::float8, count(*) FILTER "
                "(WHERE status = 'completed') FROM jobs"
            )
            row = connection.execute(statement).fetchone()
            assert row is not None
        cpu = _cpu_seconds(plant) - cpu_before
    shutil.rmtree(folder, ignore_errors=True)
    per_second = num_jobs / float(str(row[0]))
    return {
        "workers": num_workers,
        "jobs": num_jobs,
        "completed": row[1],
        "jobs_per_second": round(per_second, 2),
        "ceiling": round(JOBS_PER_SECOND * num_workers, 2),
        "cpu_cores": round(cpu / wall_seconds, 2),
    }


def _cpu_seconds(plant: Plant) -> float:
    """Of all parts with their engines, without the servers."""
    seconds = 0.0
    for part in plant.parts:
        process = psutil.Process(part.pid)
        for one in (process, *process.children(recursive=True)):
            times = one.cpu_times()
            seconds += times.user + times.system
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4], help="the first is what others are of")
    parser.add_argument("--seconds", type=float, default=20.0, help="of work")
    given = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    reports = []
    for num_workers in given.workers:
        reports.append(measure(num_workers, given.seconds))
        ratio = round(reports[-1]["jobs_per_second"] / reports[0]["jobs_per_second"], 2)
        reports[-1] |= {"ratio": ratio, "load": round(os.getloadavg()[0], 1)}
        print(reports[-1], flush=True)
    print(json.dumps({"bench": "scaling", "runs": reports}))


if __name__ == "__main__":
    main()
