"""How far another machine's clock is from ours."""

MAX_SKEW_SECONDS = 1.0  # more is worth mending


def skew_seconds(other: float, asked_at: float, answered_at: float) -> float:
    """By how much the other clock is ahead; all times are in seconds since 1970. It was read at some moment between the
    question and the answer, so what may be due to that is no skew."""
    return other - min(max(other, asked_at), answered_at)
