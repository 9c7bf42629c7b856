"""What a load test found: percentiles, counts and rates, for people and for programs."""

import math
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Column, Table


@dataclass(slots=True)
class Attempt:
    """One request and what came of it. Times are seconds since it was sent."""

    outcome: str = "open"  # then completed, failed, cancelled, expired, refused, broken
    code: str | None = None  # of a refusal, or of what failed
    was_accepted: bool = False
    pieces: "array[float]" = field(default_factory=lambda: array("d"))  # when each piece of text came
    first_token: float | None = None
    queued: float | None = None  # as the server tells it
    took: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    is_cached: bool = False

    @property
    def time_per_token(self) -> float | None:
        """Between the first and the last piece of text, for each token after the first."""
        if len(self.pieces) < 2 or self.completion_tokens < 2:
            return None
        return (self.pieces[-1] - self.pieces[0]) / (self.completion_tokens - 1)


#: The name in JSON, what people read, and the values of one request.
TIMES: tuple[tuple[str, str, Callable[[Attempt], Iterable[float | None]]], ...] = (
    ("queue_wait_seconds", "queue wait", lambda one: (one.queued,)),
    ("time_to_first_token_seconds", "first token", lambda one: (one.first_token,)),
    ("inter_token_seconds", "per token", lambda one: (one.time_per_token,)),
    ("inter_piece_seconds", "between pieces", lambda one: (after - before for before, after in pairwise(one.pieces))),
    ("end_to_end_seconds", "whole job", lambda one: (one.took,)),
)

PERCENTILES = (50, 90, 99)

BUCKET_WIDTH = 1.01  # each bucket ends at this many times its beginning
LEAST_SECONDS = 1e-6  # what is shorter is in the first bucket


class ValueSpread:
    """Counts values in buckets, so that a test of any length takes little memory. Percentiles are right to 1 %."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()
        self._sum = 0.0
        self._least, self._most = math.inf, -math.inf

    def add(self, value: float) -> None:
        self._counts[math.ceil(math.log(max(value, LEAST_SECONDS), BUCKET_WIDTH))] += 1
        self._sum += value
        self._least, self._most = min(self._least, value), max(self._most, value)

    def summary(self) -> dict[str, float] | None:
        """None without values."""
        number = self._counts.total()
        if not number:
            return None
        found = {f"p{rank}": self._value_at(math.ceil(rank / 100 * number)) for rank in PERCENTILES}
        found |= {"mean": self._sum / number, "max": self._most}
        return {name: round(value, 6) for name, value in found.items()} | {"number": number}

    def _value_at(self, place: int) -> float:
        """The middle of the bucket that has the value with this place, from 1, in their order."""
        bucket = -1
        for bucket in sorted(self._counts):
            place -= self._counts[bucket]
            if place <= 0:
                break
        middle: float = BUCKET_WIDTH**bucket * 2 / (1 + BUCKET_WIDTH)
        return min(max(middle, self._least), self._most)


class Tally:
    """Of attempts that have ended; it keeps none of them. Times are those of completed jobs."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self._refusals: Counter[str | None] = Counter()
        self._errors: Counter[str | None] = Counter()
        self._num_cached = self._prompt_tokens = self._completion_tokens = 0
        self._spreads = {name: ValueSpread() for name, _, _ in TIMES}

    def __len__(self) -> int:
        return self.outcomes.total()

    def add(self, one: Attempt) -> None:
        self.outcomes[one.outcome] += 1
        if one.outcome == "refused":
            self._refusals[one.code] += 1
        elif one.outcome in ("failed", "broken"):
            self._errors[one.code] += 1
        self._num_cached += one.is_cached
        self._prompt_tokens += one.prompt_tokens
        self._completion_tokens += one.completion_tokens
        if one.outcome != "completed":
            return
        for name, _, values_of in TIMES:
            for value in values_of(one):
                if value is not None:
                    self._spreads[name].add(value)

    def summary(self, seconds: float) -> dict[str, Any]:
        return {
            "seconds": round(seconds, 3),
            "jobs": dict(self.outcomes),
            "refusals": dict(self._refusals),
            "errors": dict(self._errors),
            "cached": self._num_cached,
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._completion_tokens,
            "jobs_per_second": round(self.outcomes["completed"] / seconds, 3) if seconds else 0.0,
            "tokens_per_second": round(self._completion_tokens / seconds, 1) if seconds else 0.0,
        } | {name: spread.summary() for name, spread in self._spreads.items()}


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
