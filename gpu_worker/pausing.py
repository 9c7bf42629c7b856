"""Keeps tenants to their shares of the slots: which running jobs give their slots to which waiting ones.

While others wait, no tenant runs more than its share of a model's jobs, by weight. A worker whose slots are full looks
once a second (`Intake.exchange`). If a tenant that waits is due a slot, the worker claims the waiting job and in the
same moment tells the engine to stop one of the tenant that has too many. The engine hands that job back after the
tokens that it has reported, all of which are committed; so nothing is drawn twice, and the job continues as it would
after the loss of a worker. Its keys and values stay in the prefix cache while there is room.

Claiming comes first: then no two workers stop jobs in favour of the same one, and no slot is empty in between. Whatever
dies in between, each job has either its old owner or its new one.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from uuid import UUID

from domain.jobs import AttemptOutcome
from gpu_worker.commits import JobStorage
from gpu_worker.job import RunningEmbedding, RunningJob
from storage import jobs, shares
from storage.database import plan_anew
from storage.jobs import ClaimedJob
from storage.shares import NextJob, Shares
from tasks import job_log

LOOK_SECONDS = 1.0  # between two looks of a worker whose slots are full

NUM_TURNS = 4  # that others have before a tenant gets one that has received more than they: on other models, perhaps

TURN_PART = 1 / 16  # of the jobs that may leave: so many slots go round in one look, since each pause costs a prefill


@dataclass(frozen=True, slots=True)
class Candidate:
    """A running job that may be paused or, if it makes embeddings, give way."""

    job_id: UUID
    tenant_id: UUID
    priority: int
    num_quanta: float  # how many quanta it has run since it last started; at least 1
    num_sequences: int = 1


@dataclass(frozen=True, slots=True)
class Exchange:
    """The jobs that a worker has claimed although it had no slot, and those that must leave or share theirs, each with
    the claimed job for which it does."""

    claimed: list[ClaimedJob]
    leaving: Mapping[UUID, UUID]


def candidates(
    running: Collection[RunningJob], now: float, *, quantum_seconds: float, keeps_prefixes: bool = True
) -> list[Candidate]:
    """Those of a worker's jobs that may be paused.

    A job runs for a quantum first, counted from its first token, and for at least as long as that token took: starting
    it again may cost as much. Jobs that may crash engines first prove that they do not. Texts are paused only if the
    engine keeps prefixes.

    An embedding is never paused, as its vectors would be lost. It gives way: another job runs beside it, beyond the
    slots, and when that one has ended, the next. That is no more than the engine can do, since an embedding takes none
    of its sequences.
    """
    found = []
    running_ids = {job.id for job in running if not job.is_over}
    for job in running:
        if isinstance(job, RunningEmbedding) and job.gave_way_to in running_ids:
            continue
        since, quantum = _turn(job, quantum_seconds, keeps_prefixes=keeps_prefixes)
        if since is None or not job.is_going_on or job.claimed.num_suspicions:
            continue
        num_quanta = (now - since) / quantum
        if num_quanta >= 1:
            found.append(Candidate(job.id, job.claimed.tenant_id, job.claimed.priority, num_quanta, job.num_sequences))
    return found


def _turn(job: RunningJob, quantum_seconds: float, *, keeps_prefixes: bool) -> tuple[float | None, float]:
    """When the job's turn began, if it can end, and how long it is."""
    if isinstance(job, RunningEmbedding):
        return job.started_at, quantum_seconds
    if job.first_output_at is None or not keeps_prefixes:
        return None, quantum_seconds
    return job.first_output_at, max(quantum_seconds, job.first_output_at - job.started_at)


class Choice:
    """Which running jobs give their slots to which waiting ones, step by step."""

    def __init__(self, seen: Shares, may_leave: Sequence[Candidate]) -> None:
        self._weights = seen.weights
        self._num_running = dict(seen.num_running)
        self._received = seen.received
        num_slots, total_weight = sum(seen.num_running.values()), math.fsum(seen.weights.values())
        self._shares = {tenant_id: num_slots * weight / total_weight for tenant_id, weight in seen.weights.items()}
        self._num_turns = max(1, int(TURN_PART * sum(one.num_sequences for one in may_leave)))
        self._left: dict[UUID, list[Candidate]] = {}  # by tenant; the last one is the first to leave
        for candidate in sorted(may_leave, key=lambda one: (-one.priority, one.job_id)):
            self._left.setdefault(candidate.tenant_id, []).append(candidate)

    def make_room(self, job: NextJob) -> list[Candidate]:
        """Those that leave for the job; none if its tenant is not due a slot. It may get fewer slots than it has
        sequences: the others wait in the engine, as they would for the tenant's own."""
        leaving: list[Candidate] = []
        num_given = 0
        while num_given < job.num_sequences:
            next_to_leave = [candidates[-1] for candidates in self._left.values() if candidates]
            able = [one for one in next_to_leave if self._may_give(one, job, is_first=not leaving)]
            if not able:
                break
            chosen = max(able, key=self._excess)
            if not self._has_too_much(chosen, job):
                self._num_turns -= 1
            self._left[chosen.tenant_id].pop()
            self._num_running[chosen.tenant_id] -= chosen.num_sequences
            num_given += chosen.num_sequences
            leaving.append(chosen)
        if leaving:
            self._num_running[job.tenant_id] = self._num_running.get(job.tenant_id, 0) + job.num_sequences
        return leaving

    def _may_give(self, candidate: Candidate, job: NextJob, *, is_first: bool) -> bool:
        giver, taker = candidate.tenant_id, job.tenant_id
        num_held = self._num_running.get(giver, 0)
        if giver == taker or num_held <= self._shares.get(giver, math.inf):  # inf: its jobs have just ended
            return False
        if self._has_too_much(candidate, job):
            return True
        return is_first and self._num_turns > 0 and self._is_turn_over(candidate, taker)

    def _has_too_much(self, candidate: Candidate, job: NextJob) -> bool:
        """Whether the one is left its share without the slot, and the other gets no more than its own with it."""
        giver, num_taken = candidate.tenant_id, self._num_running.get(job.tenant_id, 0)
        is_left_its_share = self._num_running.get(giver, 0) - candidate.num_sequences >= self._shares[giver]
        return is_left_its_share and (num_taken == 0 or num_taken + job.num_sequences <= self._shares[job.tenant_id])

    def _is_turn_over(self, candidate: Candidate, taker: UUID) -> bool:
        """Whether the slot between two whole numbers, which neither is due all the time, goes from one to the other."""
        giver, num_taken = candidate.tenant_id, self._num_running.get(taker, 0)
        if num_taken < self._shares[taker] and self._received[taker] < self._received[giver]:
            return True
        return num_taken == 0 and candidate.num_quanta >= NUM_TURNS * self._weights[giver] / self._weights[taker]

    def _excess(self, candidate: Candidate) -> tuple[float, float]:
        giver = candidate.tenant_id
        return self._num_running[giver] / self._weights[giver], candidate.num_quanta


def choose(seen: Shares, may_leave: Sequence[Candidate]) -> list[tuple[NextJob, list[Candidate]]]:
    """Which waiting jobs take the slots of which running ones.

    A tenant with more than its share gives up jobs as long as the share is left to it, to those who have less than
    theirs or nothing. Shares are no whole numbers: of four slots, weights of 1, 2 and 4 are due 0.57, 1.14 and 2.29. So
    a slot is left that tenants use in turns: whoever has more than its share by a part of a job gives it to one that
    has less and has received less per weight. In time, everybody receives by weight, however long jobs are. One that
    runs nothing although it has received more gets a slot, too, but after NUM_TURNS of the other's. One look takes no
    more than TURN_PART of the jobs for this, and at least one.

    The tenant with most per weight gives first, or else the one whose job has run longest. Of its jobs, the least
    urgent leaves first, then the newest, which is the last to come back.
    """
    choice = Choice(seen, may_leave)
    return [(job, leaving) for job in seen.waiting if (leaving := choice.make_room(job))]


def exchange(
    storage: JobStorage, may_leave: Sequence[Candidate], known: frozenset[UUID], *, is_repeated: bool
) -> Exchange:
    """Claim the waiting jobs for which some of these running ones should leave, and say which. `known` are the jobs
    that run here."""
    chosen: list[tuple[NextJob, list[Candidate]]] = []
    claimed: list[ClaimedJob] = []
    with storage.sessions.begin() as session:
        plan_anew(session)
        released = storage.release_unknown(session, known) if is_repeated else []
        revision = storage.model_revision
        seen = shares.look(session, storage.model, model_revision=revision, limit=len(may_leave))
        if seen is not None and (chosen := choose(seen, may_leave)):
            claimed = shares.claim_these(
                session,
                storage.model,
                [job.id for job, _ in chosen],
                owner=storage.owner,
                model_revision=revision,
                lease_seconds=storage.lease_seconds,
            )
    job_log.returned(AttemptOutcome.RELEASED, released)
    storage.tell_claimed(claimed)
    leavers = {job.id: [one.job_id for one in candidates] for job, candidates in chosen}
    return Exchange(claimed, {leaver: job.id for job in claimed for leaver in leavers[job.id]})


def pause(storage: JobStorage, job_ids: Sequence[UUID]) -> None:
    with storage.sessions.begin() as session:
        paused = jobs.pause(session, job_ids, owner=storage.owner)
    job_log.paused(paused)
    storage.notifier.publish((job.job_id, job.status) for job in paused)
