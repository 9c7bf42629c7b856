"""CPUs that a container may use of a large machine."""

import os
from pathlib import Path

import pytest

from gpu_worker.engine.host_cpus import num_usable_cpus


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def large_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    write(tmp_path / "proc/self/cgroup", "0::/docker/0a1b\n")
    return tmp_path


@pytest.mark.parametrize("quota", ["max 100000\n", "nonsense\n", "0 0\n"])
def test_without_a_quota_all_cpus_that_we_may_run_on_count(large_host: Path, quota: str) -> None:
    assert num_usable_cpus(large_host) == 64
    write(large_host / "sys/fs/cgroup/cpu.max", quota)
    assert num_usable_cpus(large_host) == 64


@pytest.mark.parametrize(("quota", "num_cpus"), [("200000", 2), ("150000", 2), ("1000", 1), ("9900000", 64)])
def test_a_containers_quota_counts_on_a_large_host(large_host: Path, quota: str, num_cpus: int) -> None:
    write(large_host / "sys/fs/cgroup/cpu.max", f"{quota} 100000\n")
    assert num_usable_cpus(large_host) == num_cpus


def test_the_smallest_quota_of_all_groups_around_us_counts(large_host: Path) -> None:
    write(large_host / "sys/fs/cgroup/docker/0a1b/cpu.max", "400000 100000\n")
    write(large_host / "sys/fs/cgroup/docker/cpu.max", "150000 50000\n")
    write(large_host / "sys/fs/cgroup/cpu.max", "max 100000\n")
    assert num_usable_cpus(large_host) == 3


@pytest.mark.parametrize(("quota", "num_cpus"), [("400000", 4), ("-1", 64)])
def test_quotas_of_the_first_version_of_groups_count_too(large_host: Path, quota: str, num_cpus: int) -> None:
    write(large_host / "proc/self/cgroup", "4:cpu,cpuacct:/docker/0a1b\n5:memory:/docker/0a1b\n0::/\n")
    write(large_host / "sys/fs/cgroup/cpu/cpu.cfs_quota_us", f"{quota}\n")
    write(large_host / "sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n")
    assert num_usable_cpus(large_host) == num_cpus


def test_a_cpuset_counts_if_it_is_smaller_than_the_quota(large_host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(large_host / "sys/fs/cgroup/cpu.max", "800000 100000\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5})
    assert num_usable_cpus(large_host) == 2


def test_this_machine_can_be_read() -> None:
    assert 1 <= num_usable_cpus() <= len(os.sched_getaffinity(0))
