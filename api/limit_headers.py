"""The rate limit headers of an answer, in the forms of OpenAI and of Anthropic.

https://platform.openai.com/docs/guides/rate-limits and https://platform.claude.com/docs/en/api/rate-limits. They are
there if the request's key or tenant has such a limit. If the request has asked for a job, accepted or not, they are
exact; otherwise they are what this process last heard, at most five seconds ago.
"""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from domain.limits import BucketStanding, LimitStanding, duration_text

Headers = list[tuple[bytes, bytes]]


def openai_limit_headers(standings: Sequence[LimitStanding]) -> Headers:
    """`reset` is the time until nothing of the limit is used."""
    return [
        (f"x-ratelimit-{what}-{kind}".encode(), text.encode())
        for kind, standing in _kinds(standings)
        for what, text in (
            ("limit", str(standing.limit)),
            ("remaining", str(standing.num_remaining)),
            ("reset", duration_text(standing.seconds_until_full)),
        )
    ]


def anthropic_limit_headers(standings: Sequence[LimitStanding]) -> Headers:
    """`reset` is the time of day at which nothing of the limit is used any more."""
    now = datetime.now(UTC)
    return [
        (f"anthropic-ratelimit-{kind}-{what}".encode(), text.encode())
        for kind, standing in _kinds(standings)
        for what, text in (
            ("limit", str(standing.limit)),
            ("remaining", str(standing.num_remaining)),
            ("reset", f"{now + timedelta(seconds=standing.seconds_until_full + 1):%Y-%m-%dT%H:%M:%SZ}"),
        )
    ]


def _kinds(standings: Sequence[LimitStanding]) -> list[tuple[str, BucketStanding]]:
    """Of several jobs, what the last one left."""
    found = []
    for kind, own in (
        ("requests", [one.requests for one in standings if one.requests is not None]),
        ("tokens", [one.tokens for one in standings if one.tokens is not None]),
    ):
        if own:
            found.append((kind, min(own, key=lambda standing: standing.num_remaining)))
    return found
