"""A batch on the shipped processes, of which some are killed in its midst."""

import pytest

from tests.chaos.batch_run import CHAT, EMBEDDINGS, run

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("endpoint", [CHAT, EMBEDDINGS])
def test_each_line_is_answered_once_though_workers_and_maintenance_are_killed(endpoint: str) -> None:
    figures = run(num_lines=300, num_worker_kills=2, num_maintenance_kills=1, deadline_seconds=90, endpoint=endpoint)
    assert figures["lines"] == 300
    assert figures["kills"] == 3
