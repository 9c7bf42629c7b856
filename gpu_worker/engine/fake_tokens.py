"""What the fake back end draws: tokens that are determined by their place, their text, and how many were drawn."""

import hashlib
import itertools
import mmap
import os
import struct
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from zlib import crc32

from domain.requests import SamplingParams

_ENTRY = struct.Struct(">36sIQ")  # job id, attempt, number of tokens

_MAX_ATTEMPTS = 50_000  # counted per process; the file is sparse


class DrawnTokens:
    """The counts of one process, in its own file in `folder`. The file is mapped, so no signal can lose its content."""

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
    """Drawn tokens by job and attempt, over all processes that have ever counted in `folder`."""
    drawn = Counter[tuple[str, int]]()
    for file in folder.iterdir():
        entries = _ENTRY.iter_unpack(file.read_bytes())
        for job_id, attempt, num_tokens in itertools.takewhile(lambda entry: entry[1] > 0, entries):
            drawn[job_id.rstrip(b"\0").decode(), attempt] += num_tokens
    return drawn


SYLLABLES = ("ba", "do", "fi", "gu", "ka", "le", "mo", "nu", "pé", "ri", "sø", "ta", "ve", "wu", "ži", "🙂")

WORDS = tuple(f"{first}{second} " for first in SYLLABLES for second in SYLLABLES)

END_TOKEN_ID = len(WORDS)  # its text is empty


def hash_of(prompt_token_ids: list[int], seed: int, index: int, adapter: str | None) -> "hashlib.blake2b":
    """The hash from which all tokens of one sequence are drawn."""
    key = struct.pack(f">qI{len(prompt_token_ids)}q", seed, index, *prompt_token_ids)
    return hashlib.blake2b(key, digest_size=8, key=(adapter or "").encode())


def draw_token(sequence_hash: "hashlib.blake2b", position: int, end_chance: float) -> int:
    position_hash = sequence_hash.copy()
    position_hash.update(position.to_bytes(4))
    bits = int.from_bytes(position_hash.digest())
    if (bits >> 32) / (1 << 32) < end_chance:
        return END_TOKEN_ID
    return bits % len(WORDS)


def next_allowed(token_id: int, params: SamplingParams) -> int:
    """The token, or else the next word that is not banned, or the end token if all words are banned."""

    def is_allowed(word: int) -> bool:
        is_bad = params.bad_words and word_of(word).strip() in map(str.strip, params.bad_words)
        return not is_bad and word not in params.bad_token_ids and word in (params.allowed_token_ids or (word,))

    if is_allowed(token_id):
        return token_id
    words = ((token_id + step) % len(WORDS) for step in range(len(WORDS)))
    return next(filter(is_allowed, words), END_TOKEN_ID)


def fake_text(
    prompt_token_ids: list[int], seed: int, index: int, num_tokens: int, *, adapter: str | None = None
) -> str:
    """The text of the first `num_tokens` tokens, if the sequence does not end before."""
    sequence_hash = hash_of(prompt_token_ids, seed, index, adapter)
    return "".join(WORDS[draw_token(sequence_hash, position, 0.0)] for position in range(num_tokens))


def fake_vector(token_ids: Sequence[int]) -> list[float]:
    """Eight numbers from -1 to 1, determined by the input; not of unit length."""
    digest = hashlib.blake2b(struct.pack(f">{len(token_ids)}q", *token_ids), digest_size=8).digest()
    return [(byte - 127.5) / 127.5 for byte in digest]


def chained_token(attempt: int, link: int) -> int:
    """A token whose text is eight hexadecimal digits: two for the attempt, six for a checksum of all digits before.
    A text that mixes two attempts, or lost or repeated a piece, fails the check."""
    return (1 + attempt % 255) << 24 | link


def next_link(link: int, token_id: int) -> int:
    return crc32(f"{token_id:08x}".encode(), link) & 0xFFFFFF


def word_of(token_id: int) -> str:
    if token_id > END_TOKEN_ID:
        return f"{token_id:08x} "
    return "" if token_id == END_TOKEN_ID else WORDS[token_id]
