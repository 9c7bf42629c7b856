"""One forward pass over the scheduled rows: the protocol of all runners. Free of torch."""

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence as Rows
from typing import Any, Protocol

from gpu_worker.engine.kv_cache import BlockCopy
from gpu_worker.engine.sampling import Drawn
from gpu_worker.engine.scheduler import ScheduledRow
from gpu_worker.engine.sequence import Sequence


class DrawAgain(Exception):
    """Some rows' filters keep more tokens than the sampler considered. Launch the same rows again: the sampler will
    then use a method without this limit."""


class ModelRunner(Protocol):
    fatal_errors: tuple[type[Exception], ...]  # after which the device's context is lost, and all sequences with it
    memory_errors: tuple[type[Exception], ...]  # after which fewer rows may fit

    def copy_blocks(self, copies: Rows[BlockCopy]) -> None:
        """Copy the keys and values of whole blocks, in all layers, before the next launch reads them."""

    def wipe_blocks(self, blocks: Rows[int]) -> None:
        """Zero blocks whose content may not be finite."""

    def launch(self, rows: Rows[ScheduledRow]) -> Any:
        """Start computing the rows. Pass the result to `collect`, or drop it.

        Does not change any sequence, and may be repeated, for all the rows or some of them, with the same result.
        Raises whatever the model raises.
        """

    def collect(self, launched: Any) -> list[Drawn | None]:
        """Wait for the step and return its draws: one entry per row, in order, None for rows that need no token.

        Raises DrawAgain, GrammarFailed, or whatever the model raises; the whole step is lost then.
        """

    def can_run_ahead(self, rows: Rows[ScheduledRow]) -> bool:
        """Whether the step after `rows`, which were launched last, may be launched before they are collected."""

    def free_memory(self) -> None:
        """Return cached memory to the device, which has run out of it."""

    def memory_bytes(self) -> int:
        """What the model and its cache take, where that is known; else what this process does."""

    def discard(self, sequence: Sequence) -> None:
        """Forget what is kept for the sequence: it has ended, or its computed tokens are no longer valid."""


class AtOnce(ABC):
    """A runner without overlap between host and device: `launch` does nothing and `collect` does all the work."""

    @abstractmethod
    def run(self, rows: Rows[ScheduledRow]) -> list[Drawn | None]: ...

    def launch(self, rows: Rows[ScheduledRow]) -> Rows[ScheduledRow]:
        return rows

    def collect(self, launched: Rows[ScheduledRow]) -> list[Drawn | None]:
        return self.run(launched)

    def can_run_ahead(self, rows: Rows[ScheduledRow]) -> bool:
        return False


def process_memory_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
