"""How tests wait: for a named condition, with a time limit that even a busy machine does not reach."""

import asyncio
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

SECONDS = 60.0  # reached only by a test that fails
WORK = [sys.executable, "-I", "-S", "-c", "sum(range(2_000_000))"]
QUIET_SECONDS = 0.1  # how long WORK takes on an idle machine
MAX_PAUSE_SECONDS = 0.05


def slowness() -> float:
    """How many times longer than on an idle machine it takes now to start a process and compute a little; at least 1.
    Multiply every time limit by it, including those by which a test asserts that something is quick."""
    began_at = time.monotonic()
    subprocess.run(WORK, check=True)
    return max(1.0, (time.monotonic() - began_at) / QUIET_SECONDS)


def wait_until(
    is_true: Callable[[], Any], what: str = "it came about", *, seconds: float = SECONDS, pause_seconds: float = 0.01
) -> Any:
    """Wait until `is_true` returns something true, and return that. `seconds` is the limit on an idle machine.
    `pause_seconds` is the first pause; pauses grow with the wait, since each check may cost a query."""
    began_at = time.monotonic()
    while not (value := is_true()):
        waited_seconds = _refuse_to_wait_longer(began_at, seconds, what)
        time.sleep(max(pause_seconds, min(MAX_PAUSE_SECONDS, waited_seconds / 10)))
    return value


async def wait_until_async(
    is_true: Callable[[], Any], what: str = "it came about", *, seconds: float = SECONDS, pause_seconds: float = 0.01
) -> Any:
    """Like `wait_until`, without blocking the event loop."""
    began_at = time.monotonic()
    while not (value := is_true()):
        waited_seconds = _refuse_to_wait_longer(began_at, seconds, what)
        await asyncio.sleep(max(pause_seconds, min(MAX_PAUSE_SECONDS, waited_seconds / 10)))
    return value


def _refuse_to_wait_longer(began_at: float, seconds: float, what: str) -> float:
    """The seconds waited so far. Measures how slow the machine is only when `seconds` have passed."""
    waited_seconds = time.monotonic() - began_at
    if waited_seconds > seconds and waited_seconds > seconds * slowness():
        raise AssertionError(f"waited {waited_seconds:.0f} s in vain until {what}")
    return waited_seconds
