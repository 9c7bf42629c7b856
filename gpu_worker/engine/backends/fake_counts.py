"""How many tokens the fake engines of a system have drawn in each attempt, however each of them ended."""

import itertools
import mmap
import os
import struct
from collections import Counter
from pathlib import Path

_ENTRY = struct.Struct(">36sIQ")  # job, attempt, tokens
_MAX_ATTEMPTS = 50_000  # of one process; the file is sparse


class DrawnTokens:
    """The counts of one process, in a file of its own in `folder`. It is in the kernel's hands: no signal loses it."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"{os.getpid()}-{os.urandom(4).hex()}").open("w+b") as file:
            file.truncate(_ENTRY.size * _MAX_ATTEMPTS)
            self._memory = mmap.mmap(file.fileno(), _ENTRY.size * _MAX_ATTEMPTS)
        self._places: dict[tuple[str, int], int] = {}
        self._num_tokens = Counter[tuple[str, int]]()

    def add(self, job_id: str, attempt: int, num_tokens: int) -> None:
        key = (job_id, attempt)
        place = self._places.setdefault(key, len(self._places) * _ENTRY.size)
        self._num_tokens[key] += num_tokens
        _ENTRY.pack_into(self._memory, place, job_id.encode(), attempt, self._num_tokens[key])


def num_drawn_tokens(folder: Path) -> Counter[tuple[str, int]]:
    """By job and attempt, of all processes that ever counted there."""
    drawn = Counter[tuple[str, int]]()
    for file in folder.iterdir():
        entries = _ENTRY.iter_unpack(file.read_bytes())
        for job_id, attempt, num_tokens in itertools.takewhile(lambda entry: entry[1] > 0, entries):
            drawn[job_id.rstrip(b"\0").decode(), attempt] += num_tokens
    return drawn
