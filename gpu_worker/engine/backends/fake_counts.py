"""How many tokens the fake engines of a system have drawn, however each of them ended."""

import mmap
import os
import struct
from pathlib import Path

_COUNT = struct.Struct(">Q")


class DrawnTokens:
    """The count of one process, in a file of its own in `folder`. It is in the kernel's hands: no signal loses it."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"{os.getpid()}-{os.urandom(4).hex()}").open("w+b") as file:
            file.truncate(_COUNT.size)
            self._memory = mmap.mmap(file.fileno(), _COUNT.size)
        self._num_tokens = 0

    def add(self, num_tokens: int) -> None:
        self._num_tokens += num_tokens
        _COUNT.pack_into(self._memory, 0, self._num_tokens)


def num_drawn_tokens(folder: Path) -> int:
    """Of all processes that ever counted there."""
    return sum(_COUNT.unpack(file.read_bytes())[0] for file in folder.iterdir())
