"""No request changes another: in random concurrent traces every one gets the tokens of its solo run.

Here are two dozen traces of two dozen jobs; `make thorough` has 160 of 40, `bench/engine_contamination.py` thousands.
"""

import logging
from collections.abc import Sequence

import pytest

from tests.engine_traces import NUM_DISTINCT_JOBS, run_traces
from tests.thorough import IS_THOROUGH

SEEDS: Sequence[int]
SEEDS, NUM_TRACES, NUM_JOBS = (range(4), 40, NUM_DISTINCT_JOBS) if IS_THOROUGH else ((0, 1), 12, 24)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_every_request_gets_the_tokens_of_its_solo_run(seed: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "gpu_worker")  # the traps are meant to spring
    for report in run_traces(seed, NUM_TRACES, num_jobs=NUM_JOBS):
        assert report.contaminated == []
    assert report.num_preemptions > 2
    assert min(report.num_cancelled, report.num_resumed, report.num_failed, report.num_cached_tokens) > 0
