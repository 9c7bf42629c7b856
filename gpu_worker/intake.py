"""How jobs come in: claims as many as there are tickets and room, and polls SQL when no tickets come.

A ticket is a message that lets one job be claimed: the one whose turn it is at that moment. Jobs of the isolated lane
have no tickets. They are claimed by polling SQL, as often as gpu_worker/quarantine.py decides.
"""

import logging
from collections.abc import Callable, Sequence
from threading import Lock
from time import monotonic
from uuid import UUID

from domain.jobs import Lane
from gpu_worker.commits import JobStorage
from gpu_worker.pausing import LOOK_SECONDS, Candidate, Exchange, exchange
from gpu_worker.quarantine import Quarantine
from gpu_worker.threads import Answer, StorageThread
from observability import describe_exception
from storage.jobs import ClaimedJob

log = logging.getLogger(__name__)

SHORTFALL_SECONDS = 0.1  # poll SQL this long after a claim that found fewer jobs than it could have taken

POLL_SECONDS = 2.0  # poll SQL after having free slots but no tickets for this long

FIRST_PAUSE_SECONDS, MAX_PAUSE_SECONDS = 1.0, 30.0  # after a claim that failed, and after many in a row

MAX_DOUBLINGS = 5  # of the first pause; a thousand of them would be no float any more

NUM_TOLD = 2  # claims that failed in a row: one may have met what is over already


class Offers:
    """Ids of tickets that have not been used yet, in order of arrival. Thread-safe."""

    def __init__(self) -> None:
        self._ticket_ids: dict[UUID, None] = {}
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._ticket_ids)

    def add(self, ticket_id: UUID) -> None:
        with self._lock:
            self._ticket_ids[ticket_id] = None

    def take(self, limit: int | None = None) -> list[UUID]:
        """Remove and return the first `limit` offers, or all of them."""
        with self._lock:
            taken = list(self._ticket_ids)[:limit]
            for ticket_id in taken:
                del self._ticket_ids[ticket_id]
        return taken


class Intake:
    """Claims jobs for the runner's thread. There is at most one claim per lane at a time, and tickets that arrive
    meanwhile go into the next one.

    `on_claimed(jobs, sent_at)` is called with the claimed jobs, and then `on_spent(ids)` with the tickets used for
    them, including those for which there was no job left. `on_exchanged(exchange, sent_at)` is called if jobs were
    claimed for which others must leave.
    """

    def __init__(
        self,
        offers: Offers,
        storage: JobStorage,
        thread: StorageThread,
        quarantine: Quarantine,
        *,
        on_claimed: Callable[[list[ClaimedJob], float], None],
        on_exchanged: Callable[[Exchange, float], None],
        on_spent: Callable[[list[UUID]], None],
    ) -> None:
        self._offers = offers
        self._storage = storage
        self._storage_thread = thread
        self._quarantine = quarantine
        self._on_claimed = on_claimed
        self._on_exchanged = on_exchanged
        self._on_spent = on_spent
        self._looked_at = 0.0  # when we last looked for tenants that are due a slot
        self._busy_lanes: set[Lane] = set()
        self._heard_at: float | None = None  # when a ticket last came, SQL was last polled, or there first was room
        self._num_failed = 0  # claims, since the last one that did not fail
        self._last_error = ""
        self._rests_until = 0.0  # after claims that failed

    @property
    def is_claiming(self) -> bool:
        return bool(self._busy_lanes)

    @property
    def is_resting(self) -> bool:
        """Whether claims have failed, so that another worker should have the tickets: who sends them sends new ones
        each second, and each would cost a claim and a release."""
        return monotonic() < self._rests_until

    @property
    def trouble(self) -> str | None:
        """Why no job can be claimed."""
        return f"it cannot claim jobs: {self._last_error}" if self._num_failed >= NUM_TOLD else None

    def forget_failures(self) -> None:
        """Nobody wants jobs from here at present, so nobody misses them."""
        self._num_failed, self._rests_until = 0, 0.0

    def claim(self, now: float, *, num_free: int, known: frozenset[UUID]) -> None:
        """Use the tickets that there is room for, or poll SQL now and then if there are none. `known` jobs already run
        here."""
        if num_free <= 0 or self._busy_lanes or self._storage_thread.is_away or self.is_resting:
            return  # a claim is in progress; if it is for the isolated lane, its job must run alone
        self._heard_at = self._heard_at or now
        if ticket_ids := self._offers.take(num_free):
            self._heard_at = now
            self._claim(Lane.STANDARD, len(ticket_ids), known, num_slots=num_free, ticket_ids=ticket_ids)
        elif now - self._heard_at >= POLL_SECONDS:
            self._heard_at = now
            self._storage_thread.submit(lambda _: self._storage.plan_ahead(), lambda _: None)
            self._claim(Lane.STANDARD, num_free, known, num_slots=num_free)

    def share(self, now: float, may_leave: Callable[[float], list[Candidate]], *, known: frozenset[UUID]) -> None:
        """If it is time to look and jobs here may leave, claim those that are due their slots."""
        if self._busy_lanes or self._storage_thread.is_away or self.is_resting or now - self._looked_at < LOOK_SECONDS:
            return
        self._looked_at = now
        if candidates := may_leave(now):
            self._exchange(candidates, known)

    def _exchange(self, candidates: list[Candidate], known: frozenset[UUID]) -> None:
        self._busy_lanes.add(Lane.STANDARD)

        def on_done(answer: Answer[Exchange]) -> None:
            self._busy_lanes.discard(Lane.STANDARD)
            self._num_failed = 0
            self._on_exchanged(answer.value, answer.sent_at)

        def on_error(exc: Exception) -> None:
            self._busy_lanes.discard(Lane.STANDARD)
            log.error("no slots could be exchanged", exc_info=exc)
            self._rest(exc)

        self._storage_thread.submit(
            lambda is_repeated: exchange(self._storage, candidates, known, is_repeated=is_repeated), on_done, on_error
        )

    def look_into_quarantine(self, now: float, *, is_resting: bool, known: frozenset[UUID]) -> None:
        """Claim one job that must run alone, if it is time to look for one."""
        if self._busy_lanes or self._storage_thread.is_away or self.is_resting:
            return
        min_suspicions = self._quarantine.take_look(now, is_resting=is_resting)
        if min_suspicions is not None:
            self._claim(Lane.ISOLATED, 1, known, num_slots=1, min_suspicions=min_suspicions)

    def _claim(
        self,
        lane: Lane,
        limit: int,
        known: frozenset[UUID],
        *,
        num_slots: int,
        min_suspicions: int = 0,
        ticket_ids: Sequence[UUID] = (),
    ) -> None:
        self._busy_lanes.add(lane)

        def on_done(answer: Answer[list[ClaimedJob]]) -> None:
            self._busy_lanes.discard(lane)
            self._num_failed = 0
            if answer.value:  # the engine need not wait for it, but what happens to these jobs next is told after it
                self._storage_thread.submit(lambda _: self._storage.tell_claimed(answer.value), lambda _: None)
            self._on_claimed(answer.value, answer.sent_at)
            self._on_spent(list(ticket_ids))
            if lane is Lane.STANDARD and len(answer.value) < limit and (answer.value or ticket_ids):
                # Others may have had the rows locked that it looked at, or only batch lines are left.
                self._heard_at = monotonic() - POLL_SECONDS + SHORTFALL_SECONDS

        def on_error(exc: Exception) -> None:
            # Not an outage, after which the call is repeated. Whoever sends messages finds that some are missing. The
            # claim may have been committed before the error.
            self._busy_lanes.discard(lane)
            log.error("no jobs could be claimed", exc_info=exc)
            self._rest(exc)
            self._storage_thread.submit(lambda _: self._storage.release_others(known), lambda _: None)
            self._on_spent(list(ticket_ids))

        self._storage_thread.submit(
            lambda is_repeated: self._storage.claim(
                limit, lane, known, num_slots=num_slots, min_suspicions=min_suspicions, is_repeated=is_repeated
            ),
            on_done,
            on_error,
        )

    def _rest(self, exc: Exception) -> None:
        seconds = min(FIRST_PAUSE_SECONDS * 2 ** min(self._num_failed, MAX_DOUBLINGS), MAX_PAUSE_SECONDS)
        self._num_failed += 1
        self._last_error, self._rests_until = describe_exception(exc), monotonic() + seconds
