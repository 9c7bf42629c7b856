"""Ids: one job, one suffix, whatever the prefix."""

from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ulid import ULID

from domain.jobs import SEPARATOR_BY_PREFIX, external_id, new_id, parse_id


@given(st.uuids(), st.sampled_from(sorted(SEPARATOR_BY_PREFIX)))
def test_every_id_survives_the_round_trip_under_every_prefix(id_: UUID, prefix: str) -> None:
    assert parse_id(external_id(id_, prefix)) == id_
    assert parse_id(external_id(id_, prefix).lower()) == id_


@given(st.uuids())
def test_the_suffix_is_the_ulid_of_the_same_bits(id_: UUID) -> None:
    assert external_id(id_) == f"job_{ULID.from_uuid(id_)}"


def test_ids_sort_by_the_time_they_were_drawn() -> None:
    assert abs(ULID.from_uuid(new_id()).timestamp - ULID().timestamp) < 60
    assert external_id(UUID(int=1 << 80)) < external_id(UUID(int=2 << 80))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "job_",
        "_" + "0" * 26,
        "0" * 26,
        "job-" + "0" * 26,
        "chatcmpl_" + "0" * 26,
        "file_" + "0" * 26,
        "job_" + "0" * 25,
        "job_" + "0" * 27,
        "job_8" + "0" * 25,
        "job_" + "0" * 25 + "U",
        "job_" + "0" * 25 + "ſ",
        "job_" + "0" * 25 + " ",
        "00000000-0000-0000-0000-000000000000",
    ],
)
def test_what_is_no_id_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no"):
        parse_id(text)


def test_an_unknown_prefix_is_refused() -> None:
    with pytest.raises(ValueError, match="no id has the prefix 'thread'"):
        external_id(UUID(int=0), "thread")
