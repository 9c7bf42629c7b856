"""Takes the steps of erasures that administrators have asked for, whose rows remember how far they are."""

import logging
from time import monotonic
from uuid import UUID

from sqlalchemy import Engine
from sqlalchemy.orm import Session, sessionmaker

from maintenance.archive import ArchiveUnavailable, erase_archived
from storage import erasures
from storage.erasure import Person
from storage.erasures import Erasure

log = logging.getLogger(__name__)

LOOK_SECONDS = 2.0  # between two looks while there is nothing to do

SEE_LOG = "its last step failed with {exc.__class__.__name__}, and is tried again; maintenance's log says more"

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
        """One step of this erasure, or of any that is due. None if there is none, or another process is at it or at the
        archive. One that fails is put off, so that it doesn't hold up the others."""
        with self._sessions() as session:
            found = erasures.take_due(session, erasure_id)
            if found is None:
                return None
            erasure_id = found.id
            try:
                self._step(session, found)
            except Exception as exc:  # of the database, too: if it is away, nothing can be noted either
                session.rollback()
                is_explained = isinstance(exc, ArchiveUnavailable)
                log.warning("an erasure is put off", exc_info=not is_explained, extra={"erasure": str(erasure_id)})
                erasures.put_off(session, erasure_id, error=str(exc) if is_explained else SEE_LOG.format(exc=exc))
                session.commit()
        if found.is_done:
            log.info("a user is erased", extra={"num_jobs": found.num_jobs, "num_batches": found.num_batches})
        return found

    def _step(self, session: Session, found: Erasure) -> None:
        if found.step != "archive":
            erasures.take_step(session, found, has_archive=self._archive_url is not None)
        session.commit()
        if found.step == "archive":
            num_erased = self._erase_archived(found.tenant_id, found.person)
            if num_erased is not None:  # otherwise its time at the archive comes again
                erasures.end_archive(session, found.id, num_erased)
                session.commit()

    def _erase_archived(self, tenant_id: UUID, person: Person) -> int | None:
        """After the jobs in the database, of which none can be archived any more then. What is done twice does no
        harm."""
        if self._archive_url is None:
            raise ArchiveUnavailable(NO_ARCHIVE)
        return erase_archived(self._database, self._archive_url, tenant_id, person)
