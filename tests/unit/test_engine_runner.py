"""Sequences of unlike length share a pass without paying for each other's padding."""

from hypothesis import given
from hypothesis import strategies as st

from gpu_worker.engine.runner import MAX_PADDING, group_by_length


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
