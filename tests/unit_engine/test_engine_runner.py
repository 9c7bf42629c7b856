"""Sequences of unlike length share a pass without paying for each other's padding, or for what was gathered before."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gpu_worker.engine.cpu.attention import MAX_PADDING, BlockCache, group_by_length
from tests.engine_driver import Collected, make_add, make_engine, run, step


@given(lengths=st.lists(st.integers(1, 2000), max_size=40))
def test_groups_cover_every_row_once_and_pad_little(lengths: list[int]) -> None:
    lengths = sorted(lengths, reverse=True)
    groups = group_by_length(lengths)
    assert [row for start, stop in groups for row in range(start, stop)] == list(range(len(lengths)))
    for start, stop in groups:
        assert sum(lengths[start] - length for length in lengths[start:stop]) <= MAX_PADDING


def test_sequences_of_like_length_stay_together() -> None:
    assert group_by_length([70] * 16) == [(0, 16)]
    assert group_by_length([1000, 70, 70, 70]) == [(0, 1), (1, 4)]
    assert group_by_length([]) == []


def test_a_batch_that_stays_together_is_gathered_once_in_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(max_num_batched_tokens=128)
    gathered = count_gathers(monkeypatch)
    run(engine, [make_add(str(number), [10 + number] * 20, ignore_eos=True) for number in range(4)])
    assert gathered == [4, 4], "once in each of two layers, for 15 decoding steps"


def test_what_is_kept_reads_as_what_is_gathered_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = run_with_comers_and_goers()
    monkeypatch.setattr("gpu_worker.engine.cpu.attention.MAX_KEPT_BYTES", 0)
    gathered = count_gathers(monkeypatch)
    anew = run_with_comers_and_goers()
    assert len(gathered) > 100, "nothing was to be kept"
    assert kept == anew


def run_with_comers_and_goers() -> Collected:
    """Lengths over several blocks; every few steps another one enters, and one leaves."""
    engine = make_engine()
    collected = Collected()
    for number in range(12):
        prompt = [10 + number * 7 + position for position in range(3 + number * 5)]
        engine.add(make_add(str(number), prompt, max_tokens=60 - 4 * number, ignore_eos=True, logprobs=2))
        for _ in range(6):
            collected.take(step(engine))
    engine.abort("11", 1, "cancelled")
    while engine.has_work:
        collected.take(step(engine))
    return collected


def count_gathers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one number with every call."""
    calls: list[int] = []
    gather: Any = BlockCache.gather

    def counted(layer: BlockCache, heads: Tensor, num_sequences: int) -> tuple[Tensor, Tensor]:
        calls.append(num_sequences)
        keys, values = gather(layer, heads, num_sequences)
        assert bool(torch.isfinite(keys).all())
        return keys, values

    monkeypatch.setattr(BlockCache, "gather", counted)
    return calls
