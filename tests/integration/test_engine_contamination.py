"""No request changes another: in random concurrent traces every one gets the tokens of its solo run.

`bench/engine_contamination.py` runs thousands of them.
"""

import logging

import pytest

from tests.engine_traces import run_traces

NUM_TRACES = 40


@pytest.mark.parametrize("seed", range(4))
def test_every_request_gets_the_tokens_of_its_solo_run(seed: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "gpu_worker")  # the traps are meant to spring
    for report in run_traces(seed, NUM_TRACES):
        assert report.contaminated == []
    assert report.num_preemptions > 2
    assert min(report.num_cancelled, report.num_resumed, report.num_failed, report.num_cached_tokens) > 0
