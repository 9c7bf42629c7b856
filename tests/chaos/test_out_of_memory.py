"""The kernel ends an engine whose container has no more memory, in the middle of jobs. It needs a control group."""

import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

import httpx
import pytest

from gpu_worker.engine.control_groups import groups
from local.lifetime import ending_with_us
from tests.chaos.plant import Plant, Process, start_prepared
from tests.waiting import wait_until

pytestmark = pytest.mark.slow

MODELS = """
[[models]]
id = "fake"
path = "none"
backend = "fake"
max_model_len = 4096
max_num_seqs = 8
[models.fake]
step_seconds = 0.02
crash_at_token = 20
crash_seed = 666
crash_how = "memory"
"""
LIMIT_BYTES = 600 << 20  # a worker and its engine take a fifth of it
LIMITS = {1: "memory.limit_in_bytes", 2: "memory.max"}
SWAP_LIMITS = {1: ("memory.memsw.limit_in_bytes", LIMIT_BYTES), 2: ("memory.swap.max", 0)}  # the first: with memory


def make_group() -> Path | None:
    """A new control group with little memory; None where we may make none."""
    for own, version in groups(Path("/"), "memory"):
        group = own / f"celeriac-test-{uuid4().hex[:8]}"
        with suppress(OSError):
            group.mkdir()
            try:
                (group / LIMITS[version]).write_text(str(LIMIT_BYTES))
            except OSError:
                group.rmdir()
            else:
                limit_swap(group, *SWAP_LIMITS[version])
                return group
    return None


def limit_swap(group: Path, name: str, limit: int) -> None:
    """Where the kernel counts swap; else there is none, or its use has no limit."""
    with suppress(OSError):
        (group / name).write_text(str(limit))


@pytest.fixture
def memory_group() -> Iterator[Path]:
    group = make_group()
    if group is None:
        pytest.skip("needs the right to make a control group with a memory limit")
    yield group
    wait_until(lambda: not (group / "cgroup.procs").read_text(), "its processes have ended")
    group.rmdir()


@pytest.fixture
def plant(tmp_path: Path, memory_group: Path) -> Iterator[Plant]:
    """Its worker, and so the engines, may take little memory."""

    def start(arguments: list[str], environment: Mapping[str, str], log: IO[bytes], folder: Path) -> Process:
        if "worker" not in arguments:
            return start_prepared(arguments, environment, log, folder)
        join = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(memory_group / "cgroup.procs")]
        command = ending_with_us([*join, sys.executable, "-m", *arguments])
        return subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, env=environment, start_new_session=True)

    settings = {"flush_max_seconds": 0.05, "lease_seconds": 5}
    with Plant(tmp_path, models=MODELS, worker_models={"gpu-1": "fake"}, settings=settings, start=start) as plant:
        plant.start_servers()
        plant.start_parts()
        plant.wait_until_ready()
        yield plant


def test_the_kernel_is_named_and_nobody_else_pays(plant: Plant) -> None:
    """Nothing is lost or repeated, and the job that took the memory ends by itself."""
    with httpx.Client(base_url=plant.api_urls[0], timeout=60) as client:

        def submit(seed: int) -> str:
            body = {"prompt": "A story", "model": "fake", "params": {"max_tokens": 120, "seed": seed}}
            return str(client.post("/v1/jobs", json=body).raise_for_status().json()["id"])

        innocent = [submit(seed) for seed in range(6)]
        glutton = submit(666)

        def job(job_id: str) -> dict[str, Any]:
            plant.watch()
            answer: dict[str, Any] = client.get(f"/v1/jobs/{job_id}").json()
            return answer

        wait_until(lambda: job(glutton)["status"] == "failed", "the kernel has ended it often enough", seconds=90)
        wait_until(lambda: all(job(job_id)["status"] == "completed" for job_id in innocent), "the others go on")
        assert all(job(job_id)["usage"]["completion_tokens"] == 120 for job_id in innocent), "nothing twice"
        assert job(glutton)["error"]["code"] in ("worker_lost", "poison_job")
    [worker] = plant.workers
    assert "killed by SIGKILL, probably by the kernel for want of memory" in worker.log()
    assert len(worker.incarnations) == 1, "its engine goes first, and takes nothing along"
