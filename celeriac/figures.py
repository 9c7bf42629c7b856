"""What a load test found: percentiles, counts and rates, for people and for programs."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Column, Table

from celeriac.load import Attempt

#: The name in JSON, what people read, and the values of one request.
TIMES: tuple[tuple[str, str, Callable[[Attempt], Iterable[float | None]]], ...] = (
    ("queue_wait_seconds", "queue wait", lambda one: (one.queued,)),
    ("time_to_first_token_seconds", "first token", lambda one: (one.first_token,)),
    ("inter_token_seconds", "per token", lambda one: (one.time_per_token,)),
    ("inter_piece_seconds", "between pieces", lambda one: (after - before for before, after in pairwise(one.pieces))),
    ("end_to_end_seconds", "whole job", lambda one: (one.took,)),
)

PERCENTILES = (50, 90, 99)


def summary(attempts: Sequence[Attempt], seconds: float) -> dict[str, Any]:
    """Times are those of completed jobs."""
    done = [one for one in attempts if one.outcome == "completed"]
    num_tokens = sum(one.completion_tokens for one in attempts)
    figures: dict[str, Any] = {
        "seconds": round(seconds, 3),
        "jobs": dict(Counter(one.outcome for one in attempts)),
        "refusals": dict(Counter(one.code for one in attempts if one.outcome == "refused")),
        "errors": dict(Counter(one.code for one in attempts if one.outcome in ("failed", "broken"))),
        "cached": sum(one.is_cached for one in attempts),
        "prompt_tokens": sum(one.prompt_tokens for one in attempts),
        "completion_tokens": num_tokens,
        "jobs_per_second": round(len(done) / seconds, 3) if seconds else 0.0,
        "tokens_per_second": round(num_tokens / seconds, 1) if seconds else 0.0,
    }
    for name, _, values_of in TIMES:
        figures[name] = spread([value for one in done for value in values_of(one) if value is not None])
    return figures


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Percentiles, each a value that was seen; None without values."""
    if not values:
        return None
    ordered = sorted(values)
    found = {f"p{rank}": ordered[max(0, math.ceil(rank / 100 * len(ordered)) - 1)] for rank in PERCENTILES}
    found |= {"mean": sum(ordered) / len(ordered), "max": ordered[-1]}
    return {name: round(value, 6) for name, value in found.items()} | {"number": len(ordered)}


def drawn(figures: Mapping[str, Any]) -> RenderableType:
    """The same for people."""
    jobs = ", ".join(f"{number:,} {outcome}" for outcome, number in figures["jobs"].items()) or "none"
    lines = [
        f"jobs     {jobs}: {figures['jobs_per_second']:.2f} completed per second",
        f"tokens   {figures['prompt_tokens']:,} read, {figures['completion_tokens']:,} written: "
        f"{figures['tokens_per_second']:,.1f} per second",
    ]
    for title, name in (("refused", "refusals"), ("failed", "errors")):
        if figures[name]:
            codes = ", ".join(f"{code} ({number:,})" for code, number in figures[name].items())
            lines.append(f"{title:<8} {escape(codes)}")
    if figures["cached"]:
        lines.append(f"cached   {figures['cached']:,} answers were those of earlier jobs")
    table = Table(Column("time", no_wrap=True), box=None, pad_edge=False)
    columns = (*(f"p{rank}" for rank in PERCENTILES), "mean", "max")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for name, title, _ in TIMES:
        if figures[name] is not None:
            table.add_row(title, *(_short(figures[name][column]) for column in columns))
    return Group(*lines, "", table) if table.row_count else Group(*lines)


def _short(seconds: float) -> str:
    number, unit = (seconds, "s") if seconds >= 1 else (seconds * 1000, "ms")
    return f"{number:.{max(0, 2 - math.floor(math.log10(max(number, 0.1))))}f} {unit}"  # three digits
