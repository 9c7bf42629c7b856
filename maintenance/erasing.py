"""Takes the steps of erasures that administrators have asked for, whose rows remember how far they are."""

import logging
from time import monotonic
from uuid import UUID

from sqlalchemy import Engine
from sqlalchemy.orm import sessionmaker

from maintenance.archive import ArchiveUnavailable, erase_archived
from storage import erasures
from storage.erasure import Person
from storage.erasures import Erasure

log = logging.getLogger(__name__)

LOOK_SECONDS = 2.0  # between two looks while there is nothing to do

NO_ARCHIVE = "the archive has jobs of this user; set CELERIAC_ARCHIVE_URL where maintenance runs"


class Eraser:
    """Any number of these may run, in any processes."""

    def __init__(self, database: Engine, archive_url: str | None) -> None:
        self._database = database
        self._sessions = sessionmaker(database, expire_on_commit=False)
        self._archive_url = archive_url
        self._look_at = 0.0

    def tick(self) -> bool:
        """Returns whether there is more to do at once."""
        if monotonic() < self._look_at:
            return False
        if self.take_step() is None:
            self._look_at = monotonic() + LOOK_SECONDS
            return False
        return True

    def take_step(self, erasure_id: UUID | None = None) -> Erasure | None:
        """One step of this erasure, or of any that is due. None if there is none, or another process is at it."""
        with self._sessions.begin() as session:
            found = erasures.take_step(session, has_archive=self._archive_url is not None, erasure_id=erasure_id)
        if found is not None and found.step == "archive":
            self._erase_archived(found.id, found.tenant_id, found.person)
        if found is not None and found.is_done:
            log.info("a user is erased", extra={"num_jobs": found.num_jobs, "num_batches": found.num_batches})
        return found

    def _erase_archived(self, erasure_id: UUID, tenant_id: UUID, person: Person) -> None:
        """After the jobs in the database, of which none can be archived any more then. What is done twice does no
        harm."""
        num_erased, error = 0, None if self._archive_url else NO_ARCHIVE
        try:
            if self._archive_url:
                num_erased = erase_archived(self._database, self._archive_url, tenant_id, person)
        except ArchiveUnavailable as exc:
            error = str(exc)
        with self._sessions.begin() as session:
            erasures.end_archive(session, erasure_id, num_erased, error=error)
