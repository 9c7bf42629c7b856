"""The whole system behind a PgBouncer in transaction mode, which dies like everything else: no job notices."""

import asyncio

import pytest
from rich.console import Console

from tests.chaos.faults import Fault
from tests.chaos.run import Options, Run
from tests.pooler import needs_pgbouncer

KINDS = ("pooler kill", "worker kill", "postgres restart", "api kill", "maintenance kill", "pooler kill")
SECONDS_APART = 2.0


@needs_pgbouncer
@pytest.mark.slow
def test_nothing_is_lost_doubled_or_stuck_behind_a_pooler_that_is_killed() -> None:
    schedule = [Fault(2 + number * SECONDS_APART, kind, choice=0.2, size=0.2) for number, kind in enumerate(KINDS)]
    options = Options(
        seconds=2 + (len(KINDS) + 1) * SECONDS_APART,
        seed=5,
        num_clients=8,
        num_apis=2,
        num_workers=2,
        has_real_model=False,
        pool_mode="transaction",
        schedule=tuple(schedule),
        is_prepared=True,
    )
    report = asyncio.run(Run(options, Console(width=160)).run())
    assert report["violations"] == {}
    assert report["faults"]["pooler kill"] == KINDS.count("pooler kill")
    assert report["jobs_accepted"] > 8
    assert report["tokens_drawn"] >= report["tokens_committed"] > 0
