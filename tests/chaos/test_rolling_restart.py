"""Every process of the system is replaced while jobs run, and no client that reconnects can tell."""

import asyncio

import pytest
from rich.console import Console

from tests.chaos.faults import Fault
from tests.chaos.run import Options, Run

NUM_APIS, NUM_WORKERS = 3, 3
STEPS = (
    *(("api drain", number / NUM_APIS) for number in range(NUM_APIS)),
    *(("worker drain", number / NUM_WORKERS) for number in range(NUM_WORKERS)),
    ("maintenance drain", 0.0),
)
SECONDS_APART = 4.0  # a process ends, and the next one of its place is at work
ROLLING = tuple(
    Fault(at=3 + number * SECONDS_APART, kind=kind, choice=choice + 0.01, size=0)
    for number, (kind, choice) in enumerate(STEPS)
)


@pytest.mark.slow
def test_a_rolling_restart_of_everything_is_not_seen() -> None:
    options = Options(
        seconds=3 + (len(STEPS) + 1) * SECONDS_APART,
        seed=3,
        num_clients=8,
        num_apis=NUM_APIS,
        num_workers=NUM_WORKERS,
        has_real_model=False,
        schedule=ROLLING,
        is_prepared=True,
    )
    report = asyncio.run(Run(options, Console(width=160)).run())
    assert report["violations"] == {}
    assert report["faults"] == {"api drain": NUM_APIS, "worker drain": NUM_WORKERS, "maintenance drain": 1}
    assert report["jobs_accepted"] > 8
    assert report["jobs_charged"] == 0
    assert report["rescues"] == 0
    assert report["jobs_by_status"].keys() <= {"completed", "cancelled", "expired"}
