"""How far another machine's clock is from ours."""

MAX_SKEW_SECONDS = 1.0  # more is worth mending


def skew_seconds(other: float, asked_at: float, answered_at: float) -> float:
    """By how much the other clock is ahead; all times are in seconds since 1970. It was read at some moment between the
    question and the answer, so what may be due to that is no skew."""
    return other - min(max(other, asked_at), answered_at)


def told_skew(seconds: float) -> str | None:
    """What a process tells of its clock, if it is worth mending. `seconds`: by how much the database's is ahead."""
    if abs(seconds) <= MAX_SKEW_SECONDS:
        return None
    return f"its clock is {abs(seconds):.1f} s {'behind' if seconds > 0 else 'ahead of'} the database's"
