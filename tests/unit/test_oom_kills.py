"""The kernel's count of OOM kills, read from files of its own shape."""

from pathlib import Path

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
