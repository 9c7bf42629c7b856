"""A cause of trouble is named by all who should; `make causes` tries all of them, and measures."""

import gc
import warnings

import pytest

from tests.chaos.cause_list import CAUSES
from tests.chaos.causes import try_all


@pytest.mark.slow
def test_causes_are_named() -> None:
    names = ["a worker is killed", "Redis is full"]
    report = try_all(names, is_prepared=True)
    with warnings.catch_warnings():  # sockets whose other ends were killed are collected here, not in another test
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()
    assert set(report["causes"]) == set(names)
    for seconds in report["causes"].values():
        assert {"health", "doctor"} <= seconds.keys(), report
    assert set(report["jobs"]) == {"completed"}, report


def test_each_cause_has_a_name_of_its_own() -> None:
    assert len({cause.name for cause in CAUSES}) == len(CAUSES)
