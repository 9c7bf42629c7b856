"""How jobs come in: claims offered deliveries in groups as room allows, and polls SQL when none arrive.

Jobs of the isolated lane are never dispatched. They are claimed by polling SQL, as often as gpu_worker/quarantine.py
decides.
"""

import logging
from collections.abc import Callable, Iterable
from threading import Lock
from uuid import UUID

from domain.jobs import Lane, external_id
from gpu_worker.commits import JobStorage
from gpu_worker.quarantine import Quarantine
from gpu_worker.threads import Answer, StorageThread
from storage.database import OUTAGES
from storage.jobs import ClaimedJob

log = logging.getLogger(__name__)

POLL_SECONDS = 2.0  # poll SQL after having free slots but no offers for this long


class Offers:
    """Jobs that have been offered but not claimed yet, in order of arrival. Thread-safe."""

    def __init__(self) -> None:
        self._job_ids: dict[UUID, None] = {}
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._job_ids)

    def add(self, job_id: UUID) -> None:
        with self._lock:
            self._job_ids[job_id] = None

    def take(self, limit: int | None = None) -> list[UUID]:
        """Remove and return the first `limit` offers, or all of them."""
        with self._lock:
            taken = list(self._job_ids)[:limit]
            for job_id in taken:
                del self._job_ids[job_id]
        return taken

    def put_back(self, job_ids: Iterable[UUID]) -> None:
        """Return offers to the head of the queue, from where they were taken."""
        with self._lock:
            self._job_ids = dict.fromkeys(job_ids) | self._job_ids


class Intake:
    """Claims jobs for the runner's thread. There is at most one claim per lane at a time, and offers that arrive
    meanwhile go into the next one.

    `on_claimed(jobs, sent_at)` is called with the claimed jobs, `on_known(ids)` with offered jobs that already run
    here, and `on_dropped(ids)` with those that could not be claimed.
    """

    def __init__(
        self,
        offers: Offers,
        storage: JobStorage,
        thread: StorageThread,
        quarantine: Quarantine,
        *,
        on_claimed: Callable[[list[ClaimedJob], float], None],
        on_known: Callable[[list[UUID]], None],
        on_dropped: Callable[[list[UUID]], None],
    ) -> None:
        self._offers = offers
        self._storage = storage
        self._storage_thread = thread
        self._quarantine = quarantine
        self._on_claimed = on_claimed
        self._on_known = on_known
        self._on_dropped = on_dropped
        self._busy_lanes: set[Lane] = set()
        self._heard_at: float | None = None  # when an offer last came, SQL was last polled, or there first was room

    @property
    def is_claiming(self) -> bool:
        return bool(self._busy_lanes)

    def claim(self, now: float, *, num_free: int, known: frozenset[UUID]) -> None:
        """Claim the offers that fit, or poll SQL now and then if there are none. `known` jobs already run here."""
        if num_free <= 0 or self._busy_lanes or self._storage_thread.is_away:
            return  # a claim is in progress; if it is for the isolated lane, its job must run alone
        self._heard_at = self._heard_at or now
        if job_ids := self._offers.take(num_free):
            self._heard_at = now
            self._on_known([job_id for job_id in job_ids if job_id in known])
            self._claim_offered([job_id for job_id in job_ids if job_id not in known], known)
        elif now - self._heard_at >= POLL_SECONDS:
            self._heard_at = now
            self._claim_next(Lane.STANDARD, num_free, known, min_suspicions=0)

    def look_into_quarantine(self, now: float, *, is_resting: bool, known: frozenset[UUID]) -> None:
        """Claim one job that must run alone, if it is time to look for one."""
        if Lane.ISOLATED in self._busy_lanes or self._storage_thread.is_away:
            return
        min_suspicions = self._quarantine.take_look(now, is_resting=is_resting)
        if min_suspicions is not None:
            self._claim_next(Lane.ISOLATED, 1, known, min_suspicions=min_suspicions)

    def _claim_offered(self, job_ids: list[UUID], known: frozenset[UUID]) -> None:
        if not job_ids:
            return
        self._busy_lanes.add(Lane.STANDARD)

        def on_done(answer: Answer[list[ClaimedJob]]) -> None:
            self._busy_lanes.discard(Lane.STANDARD)
            claimed = {job.id for job in answer.value}
            self._on_claimed(answer.value, answer.sent_at)
            self._on_dropped([job_id for job_id in job_ids if job_id not in claimed])

        def on_error(exc: Exception) -> None:
            self._busy_lanes.discard(Lane.STANDARD)
            if isinstance(exc, OUTAGES):
                self._offers.put_back(job_ids)
            elif len(job_ids) == 1:
                log.error("a job cannot be claimed", exc_info=exc, extra={"job_id": external_id(job_ids[0])})
                self._on_dropped(job_ids)
            else:  # one row that cannot be read must not prevent the others from being claimed
                for job_id in job_ids:
                    self._claim_offered([job_id], known)

        self._storage_thread.submit(
            lambda is_repeated: self._storage.claim(job_ids, known, is_repeated=is_repeated), on_done, on_error
        )

    def _claim_next(self, lane: Lane, limit: int, known: frozenset[UUID], *, min_suspicions: int) -> None:
        self._busy_lanes.add(lane)

        def on_done(answer: Answer[list[ClaimedJob]]) -> None:
            self._busy_lanes.discard(lane)
            self._on_claimed(answer.value, answer.sent_at)

        self._storage_thread.submit(
            lambda is_repeated: self._storage.claim_next(
                limit, lane, known, min_suspicions=min_suspicions, is_repeated=is_repeated
            ),
            on_done,
            lambda exc: self._busy_lanes.discard(lane),
        )
