"""The whole system under fire, for a minute, with every kind of fault at least once; and that the harness has teeth."""

import asyncio
from pathlib import Path

import pytest
from rich.console import Console

from tests.chaos.faults import WEIGHTS, make_schedule
from tests.chaos.mutants import MUTANTS
from tests.chaos.run import Options, Run
from tests.chaos.trees import copy_tree

SMOKE = Options(
    seconds=35, seed=20, faults_per_minute=60, num_clients=10, num_workers=2, has_real_model=False, is_prepared=True
)


def test_a_schedule_follows_from_its_seed_and_has_every_kind() -> None:
    schedule = make_schedule(SMOKE.seed, seconds=SMOKE.seconds, per_minute=SMOKE.faults_per_minute)
    assert schedule == make_schedule(SMOKE.seed, seconds=SMOKE.seconds, per_minute=SMOKE.faults_per_minute)
    assert {fault.kind for fault in schedule} == set(WEIGHTS)
    assert schedule != make_schedule(SMOKE.seed + 1, seconds=SMOKE.seconds, per_minute=SMOKE.faults_per_minute)


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_still_fits_the_code(name: str, tmp_path: Path) -> None:
    tree = copy_tree(tmp_path / "tree", MUTANTS[name].edits)
    for edit in MUTANTS[name].edits:
        compile((tree / edit.file).read_text(), edit.file, "exec")


@pytest.mark.slow
def test_nothing_is_lost_doubled_or_stuck_under_every_kind_of_fault() -> None:
    report = asyncio.run(Run(SMOKE, Console(width=160)).run())
    assert report["violations"] == {}
    assert report["jobs_accepted"] > 5
    assert report["num_faults"] > 20
    assert "worker pause" in report["faults"]
    assert report["tokens_drawn"] >= report["tokens_committed"] > 0


@pytest.mark.long
@pytest.mark.parametrize("name", MUTANTS)
def test_the_harness_finds_what_is_wrong_with(name: str) -> None:
    mutant = MUTANTS[name]
    options = Options(
        seconds=30,
        seed=1,
        faults_per_minute=40,
        num_clients=12,
        num_apis=1,
        num_workers=3,
        has_real_model=False,
        quiet_seconds=15,
        edits=mutant.edits,
        weights=mutant.weights,
    )
    report = asyncio.run(Run(options, Console(width=160)).run())
    assert report["violations"].keys() & mutant.shows
