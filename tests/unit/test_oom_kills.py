"""The kernel's count of OOM kills, read from files of its own shape."""

from pathlib import Path

import pytest

from gpu_worker import quarantine
from gpu_worker.quarantine import OomKills

EVENTS = "low 0\nhigh 0\nmax 12\noom 3\noom_kill {}\noom_group_kill 9\n"


def test_a_kill_since_the_last_question_is_possible_once(tmp_path: Path) -> None:
    events = tmp_path / "memory.events"
    events.write_text(EVENTS.format(2))
    kills = OomKills([tmp_path / "missing", events])
    assert not kills.is_possible()
    events.write_text(EVENTS.format(3))
    assert kills.is_possible()
    assert not kills.is_possible()


def test_where_nobody_counts_it_is_always_possible(tmp_path: Path) -> None:
    (tmp_path / "vmstat").write_text("nr_free_pages 7\n")
    assert OomKills([tmp_path / "missing", tmp_path / "vmstat"]).is_possible()
    assert OomKills([]).is_possible()


@pytest.mark.parametrize(
    ("groups", "counter"),
    [
        ("0::/system.slice/worker\n", "system.slice/worker/memory.events"),
        ("5:cpu:/\n4:memory:/pods/worker\n0::/\n", "memory/pods/worker/memory.oom_control"),
        ("4:hugetlb,memory:/worker\n", "memory/worker/memory.oom_control"),
        ("4:memory:/docker/5e1f\n0::/docker/5e1f\n", "memory/memory.oom_control"),  # as a container sees its own
        ("0::/docker/5e1f\n", "memory.events"),  # likewise, with the host's namespace
    ],
)
def test_the_count_is_that_of_our_own_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: str, counter: str
) -> None:
    """In either version of the kernel's hierarchies: a neighbour's want of memory is not ours."""
    monkeypatch.setattr(quarantine, "SYSTEM_ROOT", tmp_path)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(groups)
    own, host = tmp_path / "sys/fs/cgroup" / counter, tmp_path / "proc/vmstat"
    own.parent.mkdir(parents=True)
    own.write_text("under_oom 0\noom_kill 0\n")
    host.write_text("oom_kill 0\n")
    kills = OomKills()
    host.write_text("oom_kill 1\n")
    assert not kills.is_possible()
    own.write_text("under_oom 0\noom_kill 1\n")
    assert kills.is_possible()
