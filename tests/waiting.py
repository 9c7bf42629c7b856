"""How tests wait: for what they name, with a bound that no busy machine reaches."""

import asyncio
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

SECONDS = 60.0  # nobody waits so long, unless a test fails
WORK = [sys.executable, "-I", "-S", "-c", "sum(range(2_000_000))"]
QUIET_SECONDS = 0.1  # that WORK takes where nothing else runs
MAX_PAUSE_SECONDS = 0.05


def slowness() -> float:
    """How many times as long as on a quiet machine it takes here and now to start a process and to compute a little;
    at least 1. What bounds a duration is multiplied by it, also where a test asserts that something is quick."""
    began_at = time.monotonic()
    subprocess.run(WORK, check=True)
    return max(1.0, (time.monotonic() - began_at) / QUIET_SECONDS)


def wait_until(
    is_true: Callable[[], Any], what: str = "it came about", *, seconds: float = SECONDS, pause_seconds: float = 0.01
) -> Any:
    """What `is_true` returns once that is true. `seconds` are those of a quiet machine. `pause_seconds` is the first
    pause: who has waited for long looks less often, as a look may cost others a query."""
    began_at = time.monotonic()
    while not (value := is_true()):
        waited_seconds = _refuse_to_wait_longer(began_at, seconds, what)
        time.sleep(max(pause_seconds, min(MAX_PAUSE_SECONDS, waited_seconds / 10)))
    return value


async def wait_until_async(
    is_true: Callable[[], Any], what: str = "it came about", *, seconds: float = SECONDS, pause_seconds: float = 0.01
) -> Any:
    """As `wait_until`, while the event loop goes on."""
    began_at = time.monotonic()
    while not (value := is_true()):
        waited_seconds = _refuse_to_wait_longer(began_at, seconds, what)
        await asyncio.sleep(max(pause_seconds, min(MAX_PAUSE_SECONDS, waited_seconds / 10)))
    return value


def _refuse_to_wait_longer(began_at: float, seconds: float, what: str) -> float:
    """How long it has been; only who has waited so long asks how slow this machine is."""
    waited_seconds = time.monotonic() - began_at
    if waited_seconds > seconds and waited_seconds > seconds * slowness():
        raise AssertionError(f"waited {waited_seconds:.0f} s in vain until {what}")
    return waited_seconds
