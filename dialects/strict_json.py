"""Parses JSON and refuses what a JSON parser silently accepts: a key that appears twice in an object, NaN, Infinity."""

import json
from typing import Any, NoReturn


class DuplicateKey(ValueError):
    def __init__(self, key: str) -> None:
        super().__init__(f"the key {key[:64]!r} appears more than once in one object; send it once")
        self.key = key[:64]


class NotFinite(ValueError):
    def __init__(self, constant: str) -> None:
        super().__init__(f"{constant}, which is not JSON; send a finite number or null")


def loads_strictly(text: str) -> Any:
    """Raises DuplicateKey, NotFinite, json.JSONDecodeError, ValueError for an integer of thousands of digits, and
    RecursionError."""
    return _STRICTLY.decode(text)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) == len(pairs):
        return unique
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            raise DuplicateKey(key)
        seen.add(key)
    raise AssertionError("there are fewer keys than pairs, but no key appears twice")


def _refuse_constant(constant: str) -> NoReturn:
    raise NotFinite(constant)


_STRICTLY = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
