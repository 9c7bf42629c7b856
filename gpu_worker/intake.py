"""How jobs come in: offered deliveries are claimed together as room allows; when none arrive, SQL is asked.

The isolated lane is never dispatched: its jobs are claimed by asking SQL, as often as gpu_worker/quarantine.py says.
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

POLL_SECONDS = 2.0  # ask SQL after having free slots but no offer for so long


class Offers:
    """Jobs that were offered and are not claimed yet, in order of arrival. Thread-safe."""

    def __init__(self) -> None:
        self._job_ids: dict[UUID, None] = {}
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._job_ids)

    def add(self, job_id: UUID) -> None:
        with self._lock:
            self._job_ids[job_id] = None

    def take(self, limit: int | None = None) -> list[UUID]:
        """Remove and return the first ones."""
        with self._lock:
            taken = list(self._job_ids)[:limit]
            for job_id in taken:
                del self._job_ids[job_id]
        return taken

    def put_back(self, job_ids: Iterable[UUID]) -> None:
        """At the head, where they came from."""
        with self._lock:
            self._job_ids = dict.fromkeys(job_ids) | self._job_ids


class Intake:
    """Claims jobs for the runner's thread. One claim per lane at a time, so that offers gather meanwhile.

    `on_claimed(jobs, sent_at)` gets the claimed jobs, `on_known(ids)` the offered jobs that run here already, and
    `on_dropped(ids)` those that could not be claimed.
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
        self._heard_at: float | None = None  # when an offer came or SQL was asked last, or when there was room first

    @property
    def is_claiming(self) -> bool:
        return bool(self._busy_lanes)

    def claim(self, now: float, *, num_free: int, known: frozenset[UUID]) -> None:
        """Claim what is offered and fits; without offers, ask SQL now and then. `known` jobs run here already."""
        if num_free <= 0 or self._busy_lanes or self._storage_thread.is_away:
            return  # also while the isolated lane is being asked: a job from there must run alone
        self._heard_at = self._heard_at or now
        if job_ids := self._offers.take(num_free):
            self._heard_at = now
            self._on_known([job_id for job_id in job_ids if job_id in known])
            self._claim_offered([job_id for job_id in job_ids if job_id not in known], known)
        elif now - self._heard_at >= POLL_SECONDS:
            self._heard_at = now
            self._claim_next(Lane.STANDARD, num_free, known, min_suspicions=0)

    def look_into_quarantine(self, now: float, *, is_resting: bool, known: frozenset[UUID]) -> None:
        """Claim one job that must run alone, if it is time to."""
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
                log.error("the job cannot be claimed", exc_info=exc, extra={"job_id": external_id(job_ids[0])})
                self._on_dropped(job_ids)
            else:  # a row that cannot be read must not keep the others from being claimed
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
