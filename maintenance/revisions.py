"""What becomes of jobs that had begun under a revision of their model which no worker serves any more."""

import logging
from collections.abc import Iterable

from sqlalchemy.orm import Session, sessionmaker

from domain.jobs import JobStatus
from settings import Settings
from storage import jobs, maintenance
from storage.jobs import Restarted, Returned
from storage.workers import LIVE_SECONDS
from tasks import job_log

logger = logging.getLogger(__name__)

LOOK_EVERY_SECONDS = 5.0

Revision = tuple[str, str]  # (model, revision)


class RevisionWatch:
    """Since when each revision is gone, as this process saw it: a restart of it makes jobs wait for longer, and a
    worker that comes back in between ends the count."""

    def __init__(self, sessions: sessionmaker[Session], settings: Settings) -> None:
        self._sessions = sessions
        self._policy = settings.revision_policy
        self._patience_seconds = settings.revision_seconds
        self._look_every_seconds = min(LOOK_EVERY_SECONDS, settings.revision_seconds / 4)
        self._looked_at = float("-inf")
        self._gone_since: dict[Revision, float] = {}

    def look(self, now: float) -> list[Restarted | Returned]:
        """The jobs that were moved; `now` is monotonic."""
        if now - self._looked_at < self._look_every_seconds:
            return []
        self._looked_at = now
        with self._sessions.begin() as session:
            num_jobs_by_revision = jobs.gone_revisions(session, live_seconds=LIVE_SECONDS)
            if num_jobs_by_revision or self._gone_since:
                figures = {f"{model}/{revision}": num for (model, revision), num in num_jobs_by_revision.items()}
                maintenance.set_figures(session, "gone_revision_jobs", dict[str, float](figures))
        self._note(num_jobs_by_revision, now)
        return self._move(rev for rev, since in self._gone_since.items() if now - since >= self._patience_seconds)

    def _note(self, num_jobs_by_revision: dict[Revision, int], now: float) -> None:
        for (model, revision), num_jobs in num_jobs_by_revision.items():
            if (model, revision) not in self._gone_since:
                logger.warning(
                    "jobs had begun under a model revision that no worker serves any more",
                    extra={"model": model, "model_revision": revision, "num_jobs": num_jobs, "policy": self._policy},
                )
        self._gone_since = {rev: self._gone_since.get(rev, now) for rev in num_jobs_by_revision}

    def _move(self, revisions: Iterable[Revision]) -> list[Restarted | Returned]:
        moved: list[Restarted | Returned] = []
        for model, revision in revisions:
            if self._policy == "restart":
                with self._sessions.begin() as session:
                    restarted = jobs.restart(session, model, revision, live_seconds=LIVE_SECONDS)
                job_log.restarted(restarted, revision)
                moved += restarted
            elif self._policy == "fail":
                with self._sessions.begin() as session:
                    failed = jobs.fail_gone(session, model, revision, live_seconds=LIVE_SECONDS)
                job_log.ends(failed)
                moved += failed
        return moved


def status_after(job: Restarted | Returned) -> JobStatus:
    """What open streams are told."""
    return job.status if isinstance(job, Returned) else JobStatus.QUEUED
