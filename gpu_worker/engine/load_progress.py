"""How far the model has been loaded: back ends that can tell report it here, and the process tells the worker.

A process loads one model once, hence one listener for the process; no back end needs to pass it along.
"""

from collections.abc import Callable
from time import monotonic

MIN_PAUSE_SECONDS = 0.25  # between two reports that are passed on

_listener: Callable[[float], None] = lambda share: None  # noqa: E731
_told_at = float("-inf")


def listen(listener: Callable[[float], None]) -> None:
    """Have this called, now and then, with the share that has been loaded, on the thread that loads."""
    global _listener, _told_at
    _listener, _told_at = listener, float("-inf")


def report(share: float) -> None:
    """Call as often as is convenient, on the thread that runs the back end, with a share from 0 to 1."""
    global _told_at
    if monotonic() - _told_at >= MIN_PAUSE_SECONDS:
        _told_at = monotonic()
        _listener(share)
