"""Draws on a CPU: exactly the tokens that sampling.py defines, without computing noise for the whole vocabulary.

Free of torch, since engines in environments of their own draw by it, too; cuda/noise.py has the same noise for a GPU.

A token's noise is a hash of (seed, sequence index, output position, token id), so a draw does not depend on the other
sequences in the batch, on preemptions, or on how often the job was resumed. The hash is Chris Wellons' integer hash
"lowbias32", keyed in two places (https://github.com/skeeto/hash-prospector). Its lower 31 bits are mapped to standard
Gumbel noise in descending order: the lower the bits, the higher the noise.

Gumbel-max without noise for every token: find the tokens with the highest noise ("loud" tokens) and the greatest of
their logits. Any other token can win only if its logit is greater still. There are about as many candidates of either
kind as the square root of the vocabulary's size, whatever the distribution.

Each filter keeps the tokens whose logit reaches a certain floor. To find the floor of top-p, one would have to sort.
Instead, draw without it first: if the tokens more likely than the drawn one have less than top_p of the probability
mass, then top-p keeps the drawn token.
"""

import struct
from collections.abc import Sequence as Rows
from dataclasses import dataclass, replace
from functools import lru_cache
from hashlib import blake2b
from math import ceil, log, sqrt

import numpy as np
from numpy.typing import NDArray

from domain.requests import SamplingParams
from gpu_worker.engine.sequence import Sequence

FACTORS = (0x9E3779B9, 0x7FEB352D, 0x846CA68B)

CACHED_NUMBERS = 2**16  # per buffer; three such buffers fit into a CPU's level 2 cache


def noise_key(seed: int, index: int, position: int) -> tuple[int, int]:
    """A 64-bit key that identifies one draw, in two halves. It must stay the same on every machine and in every
    version, so that resumed jobs continue with the same noise."""
    digest = blake2b(struct.pack("<qqq", seed, index, position), digest_size=8).digest()
    first, second = struct.unpack("<ii", digest)
    return first, second


def noise_of(
    token_ids: NDArray[np.int64], first: NDArray[np.uint32], second: NDArray[np.uint32]
) -> NDArray[np.float32]:
    """Of single tokens, each with its own key; all arrays are (num_tokens,)."""
    bits = token_ids.astype(np.uint32)
    bits *= np.uint32(FACTORS[0])
    bits += first
    _mix_but_last(bits, second, np.empty_like(bits))
    bits ^= bits >> np.uint32(16)
    return _gumbel(bits)


def _gumbel(bits: NDArray[np.uint32]) -> NDArray[np.float32]:
    """The logarithms are taken in double precision, so that no library's float32 shows in a draw."""
    uniform = ((bits & np.uint32(0x7FFFFFFF)).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-31)
    with np.errstate(divide="ignore"):  # the largest values round to 1, whose noise is minus infinity
        noise: NDArray[np.float32] = -np.log(-np.log1p(-uniform.astype(np.float64))).astype(np.float32)
    return noise


def _mix_but_last(bits: NDArray[np.uint32], second: NDArray[np.uint32], shifted: NDArray[np.uint32]) -> None:
    """The hash from its first shift on, without the last one, in place; `shifted` is a buffer of the same size."""
    np.bitwise_xor(bits, np.right_shift(bits, 16, out=shifted), out=bits)
    np.multiply(bits, np.uint32(FACTORS[1]), out=bits)
    np.bitwise_xor(bits, np.right_shift(bits, 15, out=shifted), out=bits)
    np.bitwise_xor(bits, second, out=bits)
    np.multiply(bits, np.uint32(FACTORS[2]), out=bits)


class LoudTokens:
    """Finds the tokens with the highest noise in a draw, about the square root of the vocabulary's size in number.

    The last shift of the hash does not change its upper bits. It is enough to compare these, which needs neither the
    shift nor a logarithm. One instance per vocabulary size; not thread-safe, since its buffers are reused.
    """

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        num_rows = max(1, CACHED_NUMBERS // vocab_size)
        num_quantiles = ceil(2**15 / sqrt(vocab_size))
        self._limit = np.uint32(min(num_quantiles << 17, 2**32 - 1))  # for the lower 31 bits, shifted left by one
        self._scattered = np.arange(vocab_size, dtype=np.uint32) * np.uint32(FACTORS[0])
        self._bits = np.empty((num_rows, vocab_size), np.uint32)
        self._shifted = np.empty_like(self._bits)
        self._is_loud = np.empty_like(self._bits, np.bool_)

    def find(
        self, first: NDArray[np.uint32], second: NDArray[np.uint32]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The loud tokens of each draw, as two arrays: row numbers and token ids.

        `first` and `second`, (num_rows,), are the halves of the draws' keys. Within a row, every token that is not
        returned has less noise than any that is.
        """
        size = len(self._bits)
        cells = [
            self._find(first[start : start + size, None], second[start : start + size, None]) + start * self._vocab_size
            for start in range(0, len(first), size)
        ]
        return np.divmod(np.concatenate(cells), self._vocab_size) if cells else (np.empty(0, int), np.empty(0, int))

    def _find(self, first: NDArray[np.uint32], second: NDArray[np.uint32]) -> NDArray[np.int64]:
        """The loud tokens of at most `len(self._bits)` draws, as row * vocab_size + token id, ascending."""
        bits = self._bits[: len(first)]
        np.add(self._scattered, first, out=bits)
        _mix_but_last(bits, second, self._shifted[: len(first)])
        np.left_shift(bits, 1, out=bits)
        return np.flatnonzero(np.less(bits, self._limit, out=self._is_loud[: len(first)]))


@lru_cache(maxsize=4)
def loud_tokens(vocab_size: int) -> LoudTokens:
    return LoudTokens(vocab_size)


LEAST_TEMPERATURE = 1e-4


@dataclass(frozen=True, slots=True)
class Draws:
    """What one draw per row needs. The arrays are (num_rows,) unless stated otherwise."""

    logits: NDArray[np.float32]  # (num_rows, vocab_size)
    best: NDArray[np.int64]  # the most likely token
    temperatures: NDArray[np.float32]
    first: NDArray[np.uint32]  # first half of the noise key
    second: NDArray[np.uint32]  # second half
    floors: NDArray[np.float32]  # the lowest logit that the row's filters keep
    is_narrow: NDArray[np.bool_]  # whether few tokens reach the floor
    top_p: NDArray[np.float64]  # 1 if the floor already takes top-p into account

    def logits_of(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """The logits of one token per row."""
        return self.logits[np.arange(len(token_ids)), token_ids]


@dataclass(frozen=True, slots=True)
class Floor:
    logit: float
    is_narrow: bool


def draw(logits: NDArray[np.float32], best: NDArray[np.int64], sequences: Rows[Sequence]) -> NDArray[np.int64]:
    """Draw one token per row; no row may be greedy. `logits` is (num_rows, vocab_size), and `best`, (num_rows,), is the
    most likely token of each row."""
    draws = _make_draws(logits, best, sequences)
    token_ids = _draw_above_floors(draws)
    wrong, masses = _rows_below_top_p(draws, token_ids)
    if len(wrong):
        token_ids[wrong] = _draw_above_floors(_at_top_p(draws, wrong, token_ids[wrong], masses))
    return token_ids


def _make_draws(logits: NDArray[np.float32], best: NDArray[np.int64], sequences: Rows[Sequence]) -> Draws:
    params = [sequence.job.params for sequence in sequences]
    temperatures = [1.0 if p.temperature is None else max(p.temperature, LEAST_TEMPERATURE) for p in params]
    vocab_size = logits.shape[1]
    keys = np.array([noise_key(s.job.seed, s.index, s.num_output_tokens) for s in sequences], np.int32).view(np.uint32)
    floors = [
        _floor(logits[row], logits[row, best[row]], temperatures[row], p)
        if p.min_p or p.top_k
        else Floor(-np.inf, is_narrow=False)
        for row, p in enumerate(params)
    ]
    return Draws(
        logits,
        best,
        temperatures=np.array(temperatures, np.float32),
        first=keys[:, 0].copy(),
        second=keys[:, 1].copy(),
        floors=np.array([floor.logit for floor in floors], np.float32),
        is_narrow=np.array([floor.is_narrow for floor in floors]),
        top_p=np.array([1.0 if p.top_p is None or 0 < (p.top_k or 0) < vocab_size else p.top_p for p in params]),
    )


def _floor(row: NDArray[np.float32], greatest: np.float32, temperature: float, params: SamplingParams) -> Floor:
    """The floor of min-p and top-k; of top-p as well if top-k is set, since then only its tokens need sorting."""
    floor = float(greatest + temperature * log(params.min_p)) if params.min_p else -np.inf
    if not params.top_k or params.top_k >= len(row):
        return Floor(floor, is_narrow=False)
    kept = np.partition(row, -params.top_k)[-params.top_k :]
    if params.top_p is not None and params.top_p < 1.0:
        by_rank = _top_p_floor(kept, greatest, temperature, params.top_p)
    else:
        by_rank = kept[0]
    return Floor(max(floor, float(by_rank)), is_narrow=_is_narrow(params.top_k, len(row)))


def _is_narrow(num_kept: int, vocab_size: int) -> bool:
    """Whether computing the noise of this many tokens costs less than searching for loud tokens."""
    return num_kept <= vocab_size // 16


def _top_p_floor(
    logits: NDArray[np.float32], greatest: np.float32, temperature: float, share: float, mass: float | None = None
) -> np.float32:
    """The logit at which the cumulative probability, from the most likely token down, reaches `share` of `mass`.

    `logits` are a row's highest, in any order. `mass` is in units of the most likely token's probability; None means
    the sum over `logits`.
    """
    descending = np.sort(logits)[::-1]
    cumulative = np.exp((descending - greatest) / np.float32(temperature)).cumsum(dtype=np.float64)
    reached = np.searchsorted(cumulative, share * (cumulative[-1] if mass is None else mass))
    floor: np.float32 = descending[min(int(reached), len(descending) - 1)]
    return floor


def _draw_above_floors(draws: Draws) -> NDArray[np.int64]:
    """For each row, the token with the highest score among those that reach its floor."""
    num_rows, vocab_size = draws.logits.shape
    wide = np.flatnonzero(~draws.is_narrow)
    rows, loud_ids = loud_tokens(vocab_size).find(draws.first[wide], draws.second[wide])
    loud_rows = wide.take(rows)
    limits = draws.floors.copy()
    np.maximum.at(limits, loud_rows, draws.logits[loud_rows, loud_ids])
    likely_rows, likely_ids = np.divmod(np.flatnonzero(draws.logits >= limits[:, None]), vocab_size)
    rows, token_ids = np.concatenate((loud_rows, likely_rows)), np.concatenate((loud_ids, likely_ids))
    return _winners(num_rows, rows, token_ids, _scores(draws, rows, token_ids))


def _scores(draws: Draws, rows: NDArray[np.int64], token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """Scaled logit plus noise of each (row, token id); -inf below the row's floor."""
    logits = draws.logits[rows, token_ids]
    scores = logits / draws.temperatures.take(rows)
    scores += noise_of(token_ids, draws.first.take(rows), draws.second.take(rows))
    scores[logits < draws.floors.take(rows)] = -np.inf
    return scores


def _winners(
    num_rows: int, rows: NDArray[np.int64], token_ids: NDArray[np.int64], scores: NDArray[np.float32]
) -> NDArray[np.int64]:
    """Each row's token with the highest score; among equals the lowest id, as argmax would choose."""
    highest = np.full(num_rows, -np.inf, np.float32)
    np.maximum.at(highest, rows, scores)
    is_highest = scores == highest[rows]
    winners = np.full(num_rows, np.iinfo(np.int64).max)
    np.minimum.at(winners, rows[is_highest], token_ids[is_highest])
    return winners


def _rows_below_top_p(draws: Draws, drawn: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The rows whose drawn token top-p excludes, because the tokens above it already have the required mass; and the
    total mass of each such row."""
    rows = np.flatnonzero(draws.top_p < 1.0)
    masses, masses_above = _masses(draws, rows, draws.logits_of(drawn))
    is_wrong = masses_above >= draws.top_p[rows] * masses
    return rows[is_wrong], masses[is_wrong]


def _masses(
    draws: Draws, rows: NDArray[np.int64], bounds: NDArray[np.float32]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The probability mass of all tokens of each of `rows`, and of those with a logit above the row's bound, both in
    units of the most likely token's. `bounds` has an entry for every row of `draws`."""
    greatest, vocab_size = draws.logits_of(draws.best), draws.logits.shape[1]
    scales = 1.0 / draws.temperatures
    num_at_once = max(1, CACHED_NUMBERS // vocab_size)
    room = np.empty((min(num_at_once, len(rows)), vocab_size), np.float32)
    masses, masses_above = np.empty(len(rows)), np.empty(len(rows))
    for start in range(0, len(rows), num_at_once):
        part = rows[start : start + num_at_once]
        mass = np.take(draws.logits, part, 0, out=room[: len(part)], mode="clip")  # other modes would buffer the output
        is_above = mass > bounds[part, None]
        mass -= greatest[part, None]
        mass *= scales[part, None]
        np.exp(mass, out=mass)
        masses[start : start + num_at_once] = mass.sum(-1)
        mass *= is_above
        masses_above[start : start + num_at_once] = mass.sum(-1)
    return masses, masses_above


def _at_top_p(draws: Draws, rows: NDArray[np.int64], drawn: NDArray[np.int64], masses: NDArray[np.float64]) -> Draws:
    """The draws of `rows` only, with their floors raised to that of top-p, which lies above the tokens drawn before."""
    floors = draws.floors[rows]
    is_narrow = np.zeros(len(rows), np.bool_)
    for number, row in enumerate(rows.tolist()):
        logits = draws.logits[row]
        above = logits.compress(logits > logits[drawn[number]])
        greatest, temperature = logits[draws.best[row]], float(draws.temperatures[row])
        by_top_p = _top_p_floor(above, greatest, temperature, draws.top_p[row], masses[number])
        floors[number] = max(floors[number], by_top_p)
        is_narrow[number] = _is_narrow(len(above), len(logits))
    taken = Draws(*(getattr(draws, name)[rows] for name in Draws.__slots__))
    return replace(taken, floors=floors, is_narrow=is_narrow)
