"""How far the model has been loaded: back ends that can tell report it here, and the process tells the worker.

A process loads one model once, hence one listener for the process; no back end needs to pass it along.
"""

from collections.abc import Callable, Iterable, Iterator
from time import monotonic
from typing import Protocol, TypeVar

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


class Weight(Protocol):
    @property
    def nbytes(self) -> int: ...


W = TypeVar("W", bound=Weight)


def reported(weights: Iterable[tuple[str, W]], num_bytes: int) -> Iterator[tuple[str, W]]:
    """The weights with their names. Reports those that were taken before as a share of `num_bytes`, which is not 0."""
    num_read = 0
    for name, weight in weights:
        report(min(1.0, num_read / num_bytes))
        yield name, weight
        num_read += weight.nbytes
