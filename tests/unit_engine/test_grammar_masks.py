"""Masks of bits, as they are unpacked and laid over logits."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from gpu_worker.engine.bans import words_of
from gpu_worker.engine.cuda.masks import apply_masks, bits_on_device
from gpu_worker.engine.sampling import TokenMasks, unpacked

CPU = torch.device("cpu")


def test_both_ways_of_unpacking_agree_on_every_bit() -> None:
    words = np.random.default_rng(1).integers(-(2**31), 2**31, (5, 9), dtype=np.int64).astype(np.int32)
    words[0], words[1] = -1, 0
    assert np.array_equal(unpacked(words), bits_on_device(words, CPU).numpy())


def test_words_hold_a_bit_for_each_token() -> None:
    words = words_of([0, 31, 32, 70], 71)
    assert words.dtype == np.int32
    assert unpacked(words[None])[0].nonzero()[0].tolist() == [0, 31, 32, 70]


def apply_on_the_host(masks: TokenMasks, logits: torch.Tensor) -> None:
    masks.apply(logits.numpy())


WAYS = pytest.mark.parametrize("apply", [apply_on_the_host, apply_masks])


@WAYS
def test_only_rows_with_a_mask_lose_tokens_and_those_beyond_it_too(
    apply: Callable[[TokenMasks, torch.Tensor], None],
) -> None:
    logits = torch.arange(3 * 80, dtype=torch.float32).view(3, 80)
    before = logits.clone()
    apply(TokenMasks([2, 0], np.stack([words_of([5, 63], 64), words_of([0], 64)])), logits)
    assert torch.isfinite(logits[2]).nonzero().flatten().tolist() == [5, 63]
    assert torch.isfinite(logits[0]).nonzero().flatten().tolist() == [0]
    assert torch.equal(logits[1], before[1])
    assert logits[2, 63] == before[2, 63]


@WAYS
def test_a_mask_wider_than_the_logits_is_cut(apply: Callable[[TokenMasks, torch.Tensor], None]) -> None:
    logits = torch.zeros(1, 40)
    apply(TokenMasks([0], words_of([1, 39, 50], 64)[None]), logits)
    assert torch.isfinite(logits[0]).nonzero().flatten().tolist() == [1, 39]
