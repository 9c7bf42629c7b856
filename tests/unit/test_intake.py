"""When a worker claims: for its tickets, soon again if it found too few jobs, and now and then without any."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast
from uuid import UUID, uuid4

import pytest

from domain.jobs import Lane
from gpu_worker import intake
from gpu_worker.intake import MAX_PAUSE_SECONDS, POLL_SECONDS, SHORTFALL_SECONDS, Intake, Offers
from gpu_worker.quarantine import Quarantine
from gpu_worker.threads import Answer


class Claims:
    """A storage whose claims find `num_jobs` jobs, and remembers how many were asked for."""

    is_away = False

    def __init__(self) -> None:
        self.num_jobs = 0
        self.limits: list[int] = []
        self.steps: list[str] = []

    def claim(self, limit: int, lane: Lane, known: frozenset[UUID], **_: Any) -> list[Any]:
        self.limits.append(limit)
        return [SimpleNamespace(id=uuid4()) for _ in range(min(limit, self.num_jobs))]

    def plan_ahead(self) -> None:
        pass

    def tell_claimed(self, claimed: list[Any]) -> None:
        self.steps.append("told")

    def release_others(self, known: frozenset[UUID]) -> None:
        pass

    def submit(
        self,
        call: Callable[..., Any],
        on_done: Callable[[Answer[Any]], None],
        on_error: Callable[[Exception], None] | None = None,
    ) -> None:
        try:
            value = call(False)
        except ValueError as exc:
            assert on_error is not None
            on_error(exc)
        else:
            on_done(cast(Answer[Any], SimpleNamespace(value=value, sent_at=0.0)))


class FailingClaims(Claims):
    is_broken = True

    def claim(self, *arguments: Any, **options: Any) -> list[Any]:
        found = super().claim(*arguments, **options)
        if self.is_broken:
            raise ValueError("no such column")
        return found


def intake_of(offers: Offers, claims: Claims, spent: list[UUID]) -> Intake:
    return Intake(
        offers,
        cast(Any, claims),
        cast(Any, claims),
        Quarantine(),
        on_claimed=lambda *_: claims.steps.append("taken in"),
        on_exchanged=lambda *_: None,
        on_spent=spent.extend,
    )


@pytest.mark.parametrize(
    ("num_tickets", "num_found", "is_soon"), [(4, 4, False), (4, 1, True), (4, 0, True), (0, 2, True), (0, 0, False)]
)
def test_a_claim_that_found_too_few_jobs_is_repeated_soon(
    monkeypatch: pytest.MonkeyPatch, num_tickets: int, num_found: int, is_soon: bool
) -> None:
    now = 100.0
    monkeypatch.setattr(intake, "monotonic", lambda: now)
    offers, claims = Offers(), Claims()
    spent: list[UUID] = []
    entry = intake_of(offers, claims, spent)
    claims.num_jobs = num_found
    entry.claim(now - POLL_SECONDS, num_free=4, known=frozenset())
    tickets = [uuid4() for _ in range(num_tickets)]
    for ticket in tickets:
        offers.add(ticket)
    entry.claim(now, num_free=4, known=frozenset())
    assert (claims.limits, spent) == ([4], tickets)
    if num_found:  # before whatever becomes of them
        assert claims.steps == ["told", "taken in"]
    now += SHORTFALL_SECONDS
    entry.claim(now, num_free=4, known=frozenset())
    assert len(claims.limits) == 1 + is_soon


def test_claims_that_fail_are_repeated_less_and_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(intake, "monotonic", lambda: now)
    offers, claims = Offers(), FailingClaims()
    entry = intake_of(offers, claims, [])
    claimed_at: list[float] = []
    while now < 220.0:  # a ticket comes each second, as the janitor finds one missing
        offers.add(uuid4())
        num_before = len(claims.limits)
        entry.claim(now, num_free=4, known=frozenset())
        entry.look_into_quarantine(now, is_resting=True, known=frozenset())
        claimed_at += [now] * (len(claims.limits) - num_before)
        assert (entry.trouble is None) is (len(claimed_at) < 2)
        now += 1.0
    assert claimed_at == [100.0, 101.0, 103.0, 107.0, 115.0, 131.0, 161.0, 191.0]
    told = entry.trouble
    assert told == "it cannot claim jobs: ValueError: no such column"
    for _ in range(1_100):  # a night of it
        now += MAX_PAUSE_SECONDS
        offers.add(uuid4())
        entry.claim(now, num_free=4, known=frozenset())
        assert entry.is_resting
    claims.is_broken = False
    now += MAX_PAUSE_SECONDS
    entry.claim(now, num_free=4, known=frozenset())
    assert (entry.trouble, entry.is_resting) == (None, False)
