"""Ids of jobs and other objects: a UUID inside and in SQL, a prefixed ULID outside (HTTP, Celery, Flower, logs).

The ULID is the same 128 bits in Crockford's base 32, so both spellings sort by creation time. One job has the same 26
characters under every prefix: `job_01J...`, `chatcmpl-01J...`, `cmpl-01J...`, `resp_01J...`.
"""

import secrets
import time
from uuid import UUID

ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
ULID_LENGTH = 26
SEPARATOR_BY_PREFIX = {"job": "_", "resp": "_", "chatcmpl": "-", "cmpl": "-"}
# An event has the same 26 characters as its object.
SEPARATOR_BY_PREFIX_OF_OTHERS = {
    "batch": "_",
    "batch_req": "_",
    "evt": "_",
    "file": "-",
    "wh": "_",
    "whd": "_",
}

_VALUE_BY_CHARACTER = {character: value for value, character in enumerate(ALPHABET)}


def new_id() -> UUID:
    """A fresh id: milliseconds since 1970 in the upper 48 bits, 80 random ones below."""
    return UUID(int=(time.time_ns() // 1_000_000) << 80 | secrets.randbits(80))


def external_id(id_: UUID, prefix: str = "job") -> str:
    """The id as clients see it. Raises ValueError for an unknown prefix."""
    separator = SEPARATOR_BY_PREFIX.get(prefix) or SEPARATOR_BY_PREFIX_OF_OTHERS.get(prefix)
    if separator is None:
        raise ValueError(f"no id has the prefix {prefix!r}; choose one of: {', '.join(SEPARATOR_BY_PREFIX)}")
    value = id_.int
    ulid = "".join(ALPHABET[value >> shift & 31] for shift in range(5 * (ULID_LENGTH - 1), -1, -5))
    return f"{prefix}{separator}{ulid}"


def parse_id(text: str) -> UUID:
    """The job behind an external id, whatever its prefix; letters may be in either case. Raises ValueError."""
    prefix, ulid = text[:-ULID_LENGTH], text[-ULID_LENGTH:].upper()
    if SEPARATOR_BY_PREFIX.get(prefix[:-1]) != prefix[-1:] or not text.isascii():
        raise ValueError(f"{text[:64]!r} is not a job id; they look like job_01JABCDEFGHJKMNPQRSTVWXYZ0")
    return _parse_ulid(text, ulid)


def parse_id_of_other(text: str, prefix: str) -> UUID:
    """As `parse_id`, for objects other than jobs, which have exactly one prefix. Raises ValueError."""
    beginning = f"{prefix}{SEPARATOR_BY_PREFIX_OF_OTHERS[prefix]}"
    if text[:-ULID_LENGTH] != beginning or not text.isascii():
        raise ValueError(f"{text[:64]!r} is not an id of this kind; they begin with {beginning}")
    return _parse_ulid(text, text[-ULID_LENGTH:].upper())


def _parse_ulid(text: str, ulid: str) -> UUID:
    value = 0
    for character in ulid:
        digit = _VALUE_BY_CHARACTER.get(character)
        if digit is None:
            raise ValueError(f"{text[:64]!r} is not an id: {character!r} is not a character of Crockford's base 32")
        value = value << 5 | digit
    if value >= 1 << 128:
        raise ValueError(f"{text[:64]!r} is not an id: its first digit is above 7")
    return UUID(int=value)
