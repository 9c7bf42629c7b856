"""The key-value pairs at the beginning of a GGUF file, read without its weights and without any package."""

import mmap
import struct
from pathlib import Path
from typing import Any

MAGIC = b"GGUF"
VERSIONS = (2, 3)
FORMAT_BY_TYPE = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
MAX_ITEMS = 2**23  # of all lists together; the largest vocabularies have half a million tokens and as many merges


def read_header(file: Path) -> dict[str, Any]:
    """All pairs by key: numbers, booleans, texts, and lists of these. Raises ValueError for a file that is cut off or
    not of this format."""
    with file.open("rb") as stream:
        try:
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _Reader(content).header()
        except (struct.error, ValueError, OverflowError, MemoryError, RecursionError) as exc:
            raise ValueError(f"{file.name} has no complete GGUF header ({exc}); fetch it again") from exc


class _Reader:
    """Walks through the pairs; `_place` is where the next value begins."""

    def __init__(self, content: mmap.mmap) -> None:
        self._content = content
        self._place = 0
        self._num_items = 0

    def header(self) -> dict[str, Any]:
        if self._content[:4] != MAGIC:
            raise ValueError("it does not begin with GGUF")
        self._place = 4
        version = self._number("I")
        if version not in VERSIONS:
            raise ValueError(f"its version is {version}, of which only {VERSIONS} in little-endian order are known")
        self._number("Q")  # how many tensors there are
        found = {}
        for _ in range(self._number("Q")):
            key = self._text()
            found[key] = self._value(self._number("I"))
        return found

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._text()
        if kind == ARRAY:
            return self._array()
        return self._number(_format(kind))

    def _array(self) -> list[Any]:
        kind, length = self._number("I"), self._number("Q")
        self._num_items += length
        if self._num_items > MAX_ITEMS or length > len(self._content) - self._place:
            raise ValueError(f"a list of {length} is longer than the file, or its lists have over {MAX_ITEMS} items")
        if kind in (STRING, ARRAY):
            return [self._value(kind) for _ in range(length)]
        return list(self._numbers(f"<{length}{_format(kind)}"))

    def _text(self) -> str:
        length = self._number("Q")
        if length > len(self._content) - self._place:
            raise ValueError(f"a text of {length} bytes is longer than the file")
        start, self._place = self._place, self._place + length
        return self._content[start : start + length].decode(errors="replace")

    def _number(self, kind: str) -> Any:
        return self._numbers(f"<{kind}")[0]

    def _numbers(self, layout: str) -> tuple[Any, ...]:
        numbers = struct.unpack_from(layout, self._content, self._place)
        self._place += struct.calcsize(layout)
        return numbers


def _format(kind: int) -> str:
    if kind not in FORMAT_BY_TYPE:
        raise ValueError(f"a value has the unknown type {kind}")
    return FORMAT_BY_TYPE[kind]
