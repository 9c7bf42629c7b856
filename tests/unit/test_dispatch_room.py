"""How many messages a queue may hold."""

import pytest

from settings import Settings
from tasks.dispatch import window_size


@pytest.mark.parametrize(("num_live_slots", "expected"), [(0, 16), (8, 16), (11, 17), (100, 150)])
def test_the_window_follows_the_live_slots_and_never_closes(num_live_slots: int, expected: int) -> None:
    settings = Settings(dispatch_window_min=16, dispatch_window_factor=1.5)
    assert window_size(settings, num_live_slots) == expected
