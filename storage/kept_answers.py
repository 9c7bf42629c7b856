"""Answers about jobs that hold until something is heard of the job, for streams that begin while others of it are open.

Of thousands that arrive at once, the server accepts one in each turn of its loop. So reads that only those share who
ask while another runs have few askers each, and cost more than all else. A stream that begins with a kept answer
is like one that began when it was read: whatever has happened since will be heard, or missed by both.
"""

import asyncio
from collections.abc import Hashable
from typing import Generic, TypeVar

Answer = TypeVar("Answer")

KEEP_SECONDS = 1.0  # a message may be lost: open streams, too, are then behind for as long


class KeptAnswers(Generic[Answer]):
    """Of one process; to be used on its event loop only. Versions are those of `StreamReader.version_of`."""

    def __init__(self) -> None:
        self._by_key: dict[Hashable, tuple[int, Answer]] = {}

    def keep(self, key: Hashable, version: int | None, answer: Answer) -> None:
        """`version` is the one from before the answer was asked for."""
        if version is None:
            return
        kept = self._by_key[key] = (version, answer)
        asyncio.get_running_loop().call_later(KEEP_SECONDS, self._drop, key, kept)

    def get(self, key: Hashable, version: int | None) -> Answer | None:
        kept = self._by_key.get(key)
        return kept[1] if kept is not None and kept[0] == version else None

    def _drop(self, key: Hashable, kept: tuple[int, Answer]) -> None:
        if self._by_key.get(key) is kept:
            del self._by_key[key]
