"""How many messages a queue may hold."""

import pytest

from settings import Settings
from tasks.dispatch import room


@pytest.mark.parametrize(
    ("num_live_slots", "num_waiting", "expected"),
    [(0, 0, 16), (8, 0, 16), (100, 0, 150), (100, 149, 1), (100, 150, 0), (100, 999, 0), (0, 16, 0), (11, 0, 17)],
)
def test_the_window_follows_the_live_slots_and_never_closes(
    num_live_slots: int, num_waiting: int, expected: int
) -> None:
    settings = Settings(dispatch_window_min=16, dispatch_window_factor=1.5)
    assert room(settings, num_live_slots=num_live_slots, num_waiting=num_waiting) == expected
