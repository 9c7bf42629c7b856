"""The noise of a draw: each token's is a hash of (seed, sequence index, output position, token id).

So a draw does not depend on who else is in the batch, on preemption, or on how often the job was resumed. The hash is
the "lowbias32" finaliser, keyed twice; its lower 31 bits become standard Gumbel noise: the lower they are, the higher
it is.
"""

import struct
from functools import lru_cache
from hashlib import blake2b
from math import ceil, sqrt

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

FACTORS = (0x9E3779B9, 0x7FEB352D, 0x846CA68B)
CACHED_NUMBERS = 2**16  # of one buffer, so that a CPU's second cache holds three of them


def noise_key(seed: int, index: int, position: int) -> tuple[int, int]:
    """64 bits that stand for one draw, the same on every machine and in every version."""
    digest = blake2b(struct.pack("<qqq", seed, index, position), digest_size=8).digest()
    first, second = struct.unpack("<ii", digest)
    return first, second


def keyed_noise(token_ids: Tensor, keys: Tensor) -> Tensor:
    """Float32, one row per draw. `token_ids` is int32 (num_draws or 1, num_tokens), `keys` int32 (num_draws, 2): the
    noise_key of each."""
    first, second = keys.T[:, :, None]
    return _gumbel(_mix(token_ids, first, second))


def noise_of(
    token_ids: NDArray[np.int64], first: NDArray[np.uint32], second: NDArray[np.uint32]
) -> NDArray[np.float32]:
    """The same on a CPU for single tokens, each with a key of its own; all are (num_tokens,)."""
    bits = token_ids.astype(np.uint32)
    bits *= np.uint32(FACTORS[0])
    bits += first
    _mix_but_last(bits, second, np.empty_like(bits))
    bits ^= bits >> np.uint32(16)
    noise: NDArray[np.float32] = _gumbel(torch.from_numpy(bits.view(np.int32))).numpy()
    return noise


def _gumbel(bits: Tensor) -> Tensor:
    bits = bits.bitwise_and_(0x7FFFFFFF)
    return bits.float().add_(0.5).mul_(-(2.0**-31)).log1p_().neg_().log_().neg_()


def _mix(token_ids: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """In wrapping int32 arithmetic, whose shifts copy the sign."""
    scatter, mix, mix_again = (factor - 2**32 if factor >= 2**31 else factor for factor in FACTORS)
    bits = (token_ids * scatter).add(first)
    bits = bits.bitwise_xor_((bits >> 16).bitwise_and_(0xFFFF)).mul_(mix)
    bits = bits.bitwise_xor_((bits >> 15).bitwise_and_(0x1FFFF)).bitwise_xor_(second).mul_(mix_again)
    return bits.bitwise_xor_((bits >> 16).bitwise_and_(0xFFFF))


def _mix_but_last(bits: NDArray[np.uint32], second: NDArray[np.uint32], shifted: NDArray[np.uint32]) -> None:
    """The same from the first shift on, without the last, in place; `shifted` is room for as many numbers."""
    np.bitwise_xor(bits, np.right_shift(bits, 16, out=shifted), out=bits)
    np.multiply(bits, np.uint32(FACTORS[1]), out=bits)
    np.bitwise_xor(bits, np.right_shift(bits, 15, out=shifted), out=bits)
    np.bitwise_xor(bits, second, out=bits)
    np.multiply(bits, np.uint32(FACTORS[2]), out=bits)


class LoudTokens:
    """Finds, on a CPU, the tokens of a vocabulary whose noise is high in a draw: about the square root of them.

    The hash's last shift leaves its upper bits alone, so a limit on these spares that shift, and no logarithm is taken.
    One per vocabulary, not for two threads at once.
    """

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        num_rows = max(1, CACHED_NUMBERS // vocab_size)
        num_quantiles = ceil(2**15 / sqrt(vocab_size))
        self._limit = np.uint32(min(num_quantiles << 17, 2**32 - 1))  # on the bits without their sign, doubled
        self._scattered = np.arange(vocab_size, dtype=np.uint32) * np.uint32(FACTORS[0])
        self._bits = np.empty((num_rows, vocab_size), np.uint32)
        self._shifted = np.empty_like(self._bits)
        self._is_loud = np.empty_like(self._bits, np.bool_)

    def find(
        self, first: NDArray[np.uint32], second: NDArray[np.uint32]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows and token ids, of a draw in each row with its key, whose halves are (num_rows,). Every token that is not
        named has less noise than any that is."""
        size = len(self._bits)
        cells = [
            self._find(first[start : start + size, None], second[start : start + size, None]) + start * self._vocab_size
            for start in range(0, len(first), size)
        ]
        return np.divmod(np.concatenate(cells), self._vocab_size) if cells else (np.empty(0, int), np.empty(0, int))

    def _find(self, first: NDArray[np.uint32], second: NDArray[np.uint32]) -> NDArray[np.int64]:
        """Row times vocabulary plus token id, ascending."""
        bits = self._bits[: len(first)]
        np.add(self._scattered, first, out=bits)
        _mix_but_last(bits, second, self._shifted[: len(first)])
        np.left_shift(bits, 1, out=bits)
        return np.flatnonzero(np.less(bits, self._limit, out=self._is_loud[: len(first)]))


@lru_cache(maxsize=4)
def loud_tokens(vocab_size: int) -> LoudTokens:
    return LoudTokens(vocab_size)
