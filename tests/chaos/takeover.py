"""How long a job waits for its next attempt when the worker or the engine that ran it is killed.

Raw is from the kill to the next claim. `ours` leaves out the moments at which another injected fault made a claim
impossible: the database away, no maintenance process to rescue, or no worker to take it. `alone` are the raw times of
those that no other fault met, whatever it struck: a message in the hands of a second worker that dies, for one, is sent
again later.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from uuid import UUID

from tests.chaos.audit import Change, Owner
from tests.chaos.checker import percentiles
from tests.chaos.faults import Struck
from tests.chaos.plant import Part

STEP_SECONDS = 0.1  # how finely moments are told apart
SETTLING_SECONDS = 1.0  # after which a fault that has ended is over
START_SECONDS = 3.0  # what a process needs from its start until it does its work
KILLS = {"worker": ("worker kill",), "engine": ("engine kill", "engine segfault")}
BARRIERS = ("postgres restart", "postgres pause", "half-open postgres", "cut after commit")


def figures(
    changes: Sequence[Change],
    owners: Mapping[UUID, Owner],
    workers: Sequence[Part],
    maintenance: Sequence[Part],
    struck: Sequence[Struck],
) -> dict[str, Any]:
    away = times_away(struck)
    found: dict[str, Any] = {}
    for what, kinds in KILLS.items():
        kills = [fault for fault in struck if fault.kind in kinds and fault.target]
        spans = list(_spans(changes, owners, kills))
        ours = [end - begin - _blocked_seconds(begin, end, away, workers, maintenance) for begin, end in spans]
        alone = [end - begin for begin, end in spans if _is_alone(begin, end, struck)]
        found[f"takeover_seconds_after_{what}_kill"] = {
            "num": len(spans),
            "raw": percentiles(end - begin for begin, end in spans),
            "ours": percentiles(ours),
            "alone": percentiles(alone),
            "num_alone": len(alone),
        }
    return found


def times_away(struck: Sequence[Struck]) -> list[tuple[float, float]]:
    """When a fault kept the database away, from when to when."""
    return [(fault.began_at, fault.ended_at) for fault in struck if fault.kind in BARRIERS and fault.target]


def _is_alone(begin: float, end: float, struck: Sequence[Struck]) -> bool:
    met = [f for f in struck if f.target and f.began_at < end and f.ended_at > begin - SETTLING_SECONDS]
    return len(met) == 1


def times_without(parts: Sequence[Part], since: float, until: float) -> list[tuple[float, float]]:
    """When none of these was up, each from when to when, as finely as moments are told apart."""
    moments = [since + number * STEP_SECONDS for number in range(int((until - since) / STEP_SECONDS))]
    down = (at for at in moments if not any(_is_up(part, at) for part in parts))
    return [(at, at + STEP_SECONDS) for at in down]


def _spans(
    changes: Sequence[Change], owners: Mapping[UUID, Owner], kills: Sequence[Struck]
) -> Iterator[tuple[float, float]]:
    """From each kill to the next claim of every job that was running there; a job that only ended has none."""
    by_job: dict[UUID, list[Change]] = {}
    for change in changes:
        by_job.setdefault(change.job_id, []).append(change)
    for history in by_job.values():
        for claim, left in itertools.pairwise(history):
            owner = owners.get(claim.owner) if claim.is_claim and claim.owner is not None else None
            hits = [kill.began_at for kill in kills if owner and kill.target == owner.name]
            hit = next((at for at in hits if claim.at < at < left.at), None)
            retaken = next((change.at for change in history if change.is_claim and change.at >= left.at), None)
            if hit is not None and retaken is not None:
                yield hit, retaken


def _blocked_seconds(
    begin: float,
    end: float,
    away: Sequence[tuple[float, float]],
    workers: Sequence[Part],
    maintenance: Sequence[Part],
) -> float:
    moments = [begin + number * STEP_SECONDS for number in range(int((end - begin) / STEP_SECONDS))]
    blocked = [
        at
        for at in moments
        if any(since <= at <= until for since, until in away)
        or not any(_is_up(part, at) for part in maintenance)
        or not any(_is_up(part, at) for part in workers)
    ]
    return len(blocked) * STEP_SECONDS


def _is_up(part: Part, at: float) -> bool:
    return any(incarnation.was_well(at - START_SECONDS, at) for incarnation in part.incarnations)
