"""Which tokens the parameters of a job forbid: some always, some after others. Free of torch.

`bad_words` mean what they mean in vLLM: each is tokenized with and without a space before it, and the last token of
either sequence is not drawn where the output ends in the others. So a word is found across tokens, but one that the
model spells with other tokens than the tokenizer is not, nor is a longer word that has a token of its own.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from domain.requests import SamplingParams

BITS = 32  # per word of a mask


def words_of(token_ids: Iterable[int], num_bits: int) -> NDArray[np.int32]:
    """A bit mask of these tokens, in words like those of llguidance. All ids must be below `num_bits`."""
    bits = np.zeros(-(-num_bits // BITS) * BITS, dtype=np.uint8)
    bits[list(token_ids)] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


@dataclass(frozen=True, slots=True)
class Bans:
    """`token_ids` are never drawn, and besides those of `allowed`, if it is set, no others are. `endings` are the
    sequences of several tokens that may not be completed, by their last but one."""

    token_ids: tuple[int, ...] = ()
    allowed: NDArray[np.int32] | None = None  # a mask like those of `words_of`
    endings: dict[int, list[tuple[int, ...]]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.token_ids) or self.needs_mask

    @property
    def needs_mask(self) -> bool:
        """Whether they are more than a list of tokens."""
        return self.allowed is not None or bool(self.endings)

    def allow(self, token_id: int) -> bool:
        """Whether `allowed` has the token."""
        if self.allowed is None:
            return True
        word, bit = divmod(token_id, BITS)
        return word < len(self.allowed) and bool(int(self.allowed[word]) >> bit & 1)

    def completing(self, token_ids: Sequence[int], start: int) -> Iterator[int]:
        """The tokens that would complete a sequence at the end of the output, which begins at `start`."""
        for ending in self.endings.get(token_ids[-1], ()) if len(token_ids) > start else ():
            place = len(token_ids) - len(ending) + 1
            if place >= start and tuple(token_ids[place:]) == ending[:-1]:
                yield ending[-1]


NO_BANS = Bans()


def bans_of(params: SamplingParams, tokenizer: Tokenizer, vocab_size: int) -> Bans:
    if not (params.bad_token_ids or params.bad_words or params.allowed_token_ids):
        return NO_BANS
    sequences = dict.fromkeys(_spellings(params.bad_words, tokenizer, vocab_size))
    endings: dict[int, list[tuple[int, ...]]] = {}
    for sequence in sequences:
        if len(sequence) > 1:
            endings.setdefault(sequence[-2], []).append(sequence)
    single = (sequence[0] for sequence in sequences if len(sequence) == 1)
    allowed = params.allowed_token_ids
    return Bans(
        token_ids=tuple(dict.fromkeys([*params.bad_token_ids, *single])),
        allowed=None if allowed is None else words_of(allowed, vocab_size),
        endings=endings,
    )


def _spellings(words: Iterable[str], tokenizer: Tokenizer, vocab_size: int) -> Iterator[tuple[int, ...]]:
    """The sequences of tokens of each word. The model cannot write those that only the tokenizer has."""
    for word in words:
        for text in (word.lstrip(), f" {word.lstrip()}"):
            token_ids = tuple(tokenizer.encode(text, add_special_tokens=False).ids)
            if token_ids and max(token_ids) < vocab_size:
                yield token_ids
