"""What docs/scale.md says of large installations is what the measured costs come to."""

from bench.scale import Load, need, table
from settings import ROOT


def test_the_table_of_the_document_is_the_computed_one() -> None:
    lines = "\n".join(table())
    assert f"\n{lines}\n" in (ROOT / "docs" / "scale.md").read_text(), "run python -m bench.scale and copy its table"


def test_twice_the_workers_need_twice_as_much() -> None:
    one, two = need(Load(100)), need(Load(200))
    assert two.sql_cores == 2 * one.sql_cores
    assert two.gigabytes_per_day == 2 * one.gigabytes_per_day


def test_what_is_too_small_is_named() -> None:
    assert need(Load(1)).saturated == []
    assert set(need(Load(20_000)).saturated) == {"PostgreSQL", "Redis", "connections"}
