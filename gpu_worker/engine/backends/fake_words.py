"""The words of the fake back end, and which of them comes where: a function of prompt, seed, index and position."""

import hashlib
import struct
from collections.abc import Collection, Sequence
from zlib import crc32

SYLLABLES = ("ba", "do", "fi", "gu", "ka", "le", "mo", "nu", "pé", "ri", "sø", "ta", "ve", "wu", "ži", "🙂")
WORDS = tuple(f"{first}{second} " for first in SYLLABLES for second in SYLLABLES)
END_TOKEN_ID = len(WORDS)  # its text is empty


def hash_of(prompt_token_ids: list[int], seed: int, index: int) -> "hashlib.blake2b":
    """What all tokens of one sequence are drawn from."""
    key = struct.pack(f">qI{len(prompt_token_ids)}q", seed, index, *prompt_token_ids)
    return hashlib.blake2b(key, digest_size=8)


def draw_token(sequence_hash: "hashlib.blake2b", position: int, end_chance: float) -> int:
    position_hash = sequence_hash.copy()
    position_hash.update(position.to_bytes(4))
    bits = int.from_bytes(position_hash.digest())
    if (bits >> 32) / (1 << 32) < end_chance:
        return END_TOKEN_ID
    return bits % len(WORDS)


def next_allowed(token_id: int, bad_token_ids: Collection[int]) -> int:
    """The token, or the first word after it that is not banned; the end where all are."""
    words = ((token_id + step) % len(WORDS) for step in range(len(WORDS)))
    if token_id not in bad_token_ids:
        return token_id
    return next((word for word in words if word not in bad_token_ids), END_TOKEN_ID)


def fake_text(prompt_token_ids: list[int], seed: int, index: int, num_tokens: int) -> str:
    """The text of the first `num_tokens` tokens, if no end comes before."""
    sequence_hash = hash_of(prompt_token_ids, seed, index)
    return "".join(WORDS[draw_token(sequence_hash, position, 0.0)] for position in range(num_tokens))


def fake_vector(token_ids: Sequence[int]) -> list[float]:
    """Eight numbers from -1 to 1, a function of the input; not of unit length."""
    digest = hashlib.blake2b(struct.pack(f">{len(token_ids)}q", *token_ids), digest_size=8).digest()
    return [(byte - 127.5) / 127.5 for byte in digest]


def chained_token(attempt: int, link: int) -> int:
    """Eight hexadecimal digits: two for the attempt, six for the checksum of the digits before. A text of them that
    was spliced from two attempts, or lost or repeated a piece, does not add up."""
    return (1 + attempt % 255) << 24 | link


def next_link(link: int, token_id: int) -> int:
    return crc32(f"{token_id:08x}".encode(), link) & 0xFFFFFF


def word_of(token_id: int) -> str:
    if token_id > END_TOKEN_ID:
        return f"{token_id:08x} "
    return "" if token_id == END_TOKEN_ID else WORDS[token_id]
