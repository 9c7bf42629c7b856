"""How many CPUs this process may use: not the machine's, but those that are left to a container. Free of torch."""

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from gpu_worker.engine.control_groups import groups


def let_threads_sleep() -> None:
    """Call before torch or llama.cpp loads OpenMP, which then reads how long threads spin while they wait.

    By default they hardly ever sleep. Where another process has one of the cores, each wait lasts until the scheduler
    takes that away again, and a text takes more than ten times as long (docs/adr/0040).
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def num_usable_cpus(root: Path = Path("/")) -> int:
    """The CPUs that we may run on (taskset, cpuset), or fewer if the quota of any of our control groups is less.

    A quota of 1.5 CPUs counts as 2, as in Go and Java: one thread could not use it up.
    (https://docs.kernel.org/admin-guide/cgroup-v2.html, cpu.max; https://docs.kernel.org/scheduler/sched-bwc.html.)
    `root` is the directory that holds `proc` and `sys`.
    """
    return max(1, min([len(os.sched_getaffinity(0)), *map(math.ceil, _quotas(root))]))


def _quotas(root: Path) -> Iterator[float]:
    for folder, version in groups(root, "cpu"):
        with suppress(OSError, ValueError):  # no CPU controller here, or the quota is "max"
            if version == 2:
                quota, period = map(int, (folder / "cpu.max").read_text().split())
            else:
                quota = int((folder / "cpu.cfs_quota_us").read_text())
                period = int((folder / "cpu.cfs_period_us").read_text())
            if quota > 0 and period > 0:  # -1 is none
                yield quota / period
