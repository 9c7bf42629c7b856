"""A cause of trouble is named by all who should; `make causes` tries all of them, and measures."""

import gc
import warnings

import pytest

from tests.chaos.cause_list import CAUSES
from tests.chaos.causes import chosen, try_all


@pytest.mark.slow
def test_causes_are_named() -> None:
    names = ["a worker is killed", "Redis is full"]
    report = try_all([cause for cause in CAUSES if cause.name in names], is_prepared=True)
    with warnings.catch_warnings():  # sockets whose other ends were killed are collected here, not in another test
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()
    assert set(report["causes"]) == set(names)
    assert report["cleared"].keys() == report["causes"].keys()
    for seconds in report["causes"].values():
        assert {"health", "doctor"} <= seconds.keys(), report
    assert set(report["jobs"]) == {"completed"}, report


def test_shares_are_all_of_them() -> None:
    assert [cause for number in range(1, 6) for cause in chosen([], f"{number}/5")] == CAUSES
    assert [cause.name for cause in chosen(["Redis is full"], "1/1")] == ["Redis is full"]


def test_each_cause_has_a_name_of_its_own() -> None:
    assert len({cause.name for cause in CAUSES}) == len(CAUSES)
