"""A blocked event loop is logged once, with its stack and without any values."""

import asyncio
import logging
import threading
import time

import pytest

from metrics import event_loop_lag_seconds
from observability import EventLoopMonitor

SECRET = "my diary entry"


def stand_still(text: str, seconds: float) -> None:
    del text
    time.sleep(seconds)


def lines_of(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.message == "the event loop is blocked"]


def lag_sum() -> float:
    return sum(
        sample.value for metric in event_loop_lag_seconds.collect() for sample in metric.samples if "sum" in sample.name
    )


async def test_a_stall_is_one_line_with_its_stack(caplog: pytest.LogCaptureFixture) -> None:
    before = lag_sum()
    async with EventLoopMonitor(stall_seconds=0.25):
        await asyncio.sleep(0.2)
        stand_still(SECRET, 1.0)
        await asyncio.sleep(0.2)
    line = next(record for record in lines_of(caplog) if "stand_still" in vars(record)["stack"])
    assert "test_event_loop_monitor.py" in vars(line)["stack"]
    assert SECRET not in str(vars(line))
    assert sum("stand_still" in vars(record)["stack"] for record in lines_of(caplog)) == 1
    assert lag_sum() - before > 0.5


async def test_a_loop_that_is_not_blocked_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    async with EventLoopMonitor(stall_seconds=60.0):
        for _ in range(5):
            await asyncio.sleep(0.05)
    assert not lines_of(caplog)


async def test_a_stall_that_blocks_the_thread_too_is_logged_without_a_stack(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading.Thread, "start", lambda thread: None)
    async with EventLoopMonitor(stall_seconds=0.25):
        stand_still(SECRET, 0.6)
        await asyncio.sleep(0.1)
    line = lines_of(caplog)[0]  # a busy machine may stall the loop again
    assert "not known" in vars(line)["stack"]
