"""A stall is counted from the cut, and as ours only while SQL had something to read."""

import pytest

from tests.chaos.clients import Connection, Delta, History
from tests.chaos.stalls import Written, find_stalls


def make_history(*ways_back: Connection) -> History:
    first = Connection("start", 0, 1.0, "api", [Delta(1, "one ", 1.5)], ended="dropped", ended_at=2.0)
    return History("key", {}, job_id="job_a", connections=[first, *ways_back])


@pytest.mark.parametrize(
    ("written", "ours"),
    [
        (Written({1: 1.4, 2: 1.9}, None), 8.0),  # all the time
        (Written({1: 1.4, 2: 7.0}, None), 3.0),  # its worker was killed, too
        (Written({1: 1.4}, 9.5), 0.5),  # nothing but its end
    ],
)
def test_a_stall_is_ours_from_when_there_is_something_to_read(written: Written, ours: float) -> None:
    replayed = [Delta(1, "one ", 3.0), Delta(2, "two ", 10.0)]
    closed = Connection("last-event-id", 1, 2.2, "api", ended="closed", ended_at=2.3)
    history = make_history(closed, Connection("start", 0, 2.5, "api", replayed, ended="left", ended_at=10.1))
    [stall] = find_stalls([history], {"job_a": written})
    assert (stall.raw, stall.ours()) == (8.0, ours)
    assert len(stall.ways_back) == 2


@pytest.mark.parametrize(
    ("away", "ours"),
    [
        ([(0.0, 1.0), (11.0, 12.0)], 8.0),
        ([(6.0, 7.0), (3.0, 5.0)], 5.0),
        ([(3.0, 6.0), (4.0, 5.0)], 5.0),
        ([(1.0, 4.0), (9.0, 20.0)], 5.0),
        ([(1.0, 20.0)], 0.0),
    ],
)
def test_the_time_without_a_database_is_not_ours(away: list[tuple[float, float]], ours: float) -> None:
    history = make_history(Connection("start", 0, 2.5, "api", [Delta(2, "two ", 10.0)], ended="left"))
    [stall] = find_stalls([history], {"job_a": Written({1: 1.4, 2: 1.9}, None)})
    assert stall.ours(away) == ours


def test_a_snapshot_and_an_end_are_news() -> None:
    snapshot = Connection("snapshot", 0, 2.5, "api", snapshot=(2, "one two "), snapshot_at=3.0)
    end = Connection("last-event-id", 1, 2.5, "api", ended="terminal", ended_at=4.0)
    for way_back, raw in ((snapshot, 1.0), (end, 2.0)):
        [stall] = find_stalls([make_history(way_back)], {"job_a": Written({1: 1.4, 2: 1.9}, 1.9)})
        assert stall.raw == raw
    assert list(find_stalls([make_history()], {"job_a": Written({1: 1.4}, None)})) == [], "it heard nothing more"
