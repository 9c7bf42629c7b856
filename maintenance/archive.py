"""The archive: jobs are written to object storage before they are deleted, if CELERIAC_ARCHIVE_URL names one.

An object holds jobs of one tenant that ended on one day, a JSON object a line, compressed: what was asked, what came
out, and what it took. It is called TENANT/DAY/FIRST-DIGEST.jsonl.gz, by its first job and the ids of all of them. Its
jobs are deleted after it was written; a process that dies in between leaves them, and the next one writes the same
object again, or one with more jobs under another name. So each job is in at least one object, and a reader that finds
it in two takes either.
"""

import gzip
import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import monotonic
from typing import Any
from uuid import UUID

import orjson
from sqlalchemy import Engine
from sqlalchemy.orm import sessionmaker

from domain.errors import ExpectedError
from storage import archive
from storage.archive import DueJob, archive_lock
from storage.erasure import Person

log = logging.getLogger(__name__)

WAIT_SECONDS = 10  # of an erasure for the lock of the archive, which is given up after each turn

LOOK_SECONDS = 10.0  # between two looks for jobs that are due, and after a failure
TURN_SECONDS = 5.0  # for which one tick goes on


class ArchiveUnavailable(ExpectedError):
    """The archive cannot be opened, read or written. The message names the setting."""


class Archive:
    """Object storage at a URL, such as s3://bucket/prefix. The AWS_* variables give endpoint and credentials."""

    def __init__(self, url: str) -> None:
        try:
            from obstore.store import from_url
        except ImportError as exc:
            raise ArchiveUnavailable(
                "CELERIAC_ARCHIVE_URL needs obstore, which is not installed: pip install obstore"
            ) from exc
        with _explained(url):
            self._store = from_url(url, mkdir=True) if url.startswith("file:") else from_url(url)
        self._url = url

    def write(self, jobs: Sequence[DueJob]) -> None:
        """Jobs of one tenant and day."""
        first = jobs[0]
        digest = hashlib.sha256(b"".join(job.id.bytes for job in jobs)).hexdigest()[:12]
        name = f"{first.tenant_id}/{first.day.isoformat()}/{first.line['id']}-{digest}.jsonl.gz"
        self._put(name, [job.line for job in jobs])

    def erase(self, tenant_id: UUID, person: Person) -> int:
        """Write every object of the tenant that has jobs of this person again without them. Returns their number."""
        import obstore

        num_erased = 0
        with _explained(self._url):
            names = [entry["path"] for page in obstore.list(self._store, prefix=str(tenant_id)) for entry in page]
        for name in names:
            lines = self.read(name)
            kept = [line for line in lines if not person.has(line["key_id"], line["metadata"])]
            num_erased += len(lines) - len(kept)
            if not kept:
                with _explained(self._url):
                    obstore.delete(self._store, name)
            elif len(kept) < len(lines):
                self._put(name, kept)
        return num_erased

    def read(self, name: str) -> list[dict[str, Any]]:
        import obstore

        with _explained(self._url):
            content = bytes(obstore.get(self._store, name).bytes())
        return [orjson.loads(line) for line in gzip.decompress(content).splitlines()]

    def _put(self, name: str, lines: Sequence[dict[str, Any]]) -> None:
        import obstore

        content = gzip.compress(b"".join(orjson.dumps(line) + b"\n" for line in lines), mtime=0)
        with _explained(self._url):
            obstore.put(self._store, name, content)


@contextmanager
def _explained(url: str) -> Iterator[None]:
    from obstore.exceptions import BaseError

    try:
        yield
    except (BaseError, OSError, ValueError) as exc:
        reason = str(exc).strip().splitlines()[0][:300]
        raise ArchiveUnavailable(
            f"the archive at {url} cannot be used ({reason}); check CELERIAC_ARCHIVE_URL, AWS_ENDPOINT_URL, "
            "AWS_ALLOW_HTTP (true for http://), AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY. Jobs that are due are "
            "kept until it can"
        ) from exc


class Archiver:
    """Moves jobs that are due from the database to the archive. Its ticks never overlap."""

    def __init__(self, database: Engine, url: str) -> None:
        self._database = database
        self._sessions = sessionmaker(database, expire_on_commit=False)
        self._url = url
        self._archive: Archive | None = None
        self.trouble: str | None = None  # why the last tick that had something to do could not
        self._look_at = 0.0

    def tick(self) -> bool:
        """Returns whether there is more to do at once. Raises ArchiveUnavailable."""
        if monotonic() < self._look_at:
            return False
        try:
            is_hurried = self._turn()
        except ArchiveUnavailable as exc:
            self.trouble = str(exc)
            raise
        self.trouble = None
        return is_hurried

    def _turn(self) -> bool:
        self._look_at = monotonic() + LOOK_SECONDS
        self._archive = self._archive or Archive(self._url)
        with archive_lock(self._database) as is_taken:
            ends_at = monotonic() + TURN_SECONDS
            while is_taken and monotonic() < ends_at:
                if not self._move(self._archive):
                    return False
        self._look_at = monotonic() if is_taken else self._look_at
        return is_taken

    def _move(self, target: Archive) -> int:
        with self._sessions() as session:
            due = archive.list_due(session)
        groups: dict[tuple[UUID, Any], list[DueJob]] = {}
        for job in due:
            groups.setdefault((job.tenant_id, job.day), []).append(job)
        for (tenant_id, _), jobs in groups.items():
            target.write(jobs)
            with self._sessions.begin() as session:
                archive.delete_archived(session, tenant_id, [job.id for job in jobs])
        if due:
            log.info("archived jobs", extra={"num_jobs": len(due), "num_objects": len(groups)})
        return len(due)


def erase_archived(database: Engine, url: str, tenant_id: UUID, person: Person) -> int | None:
    """Erase a person's jobs from the archive. Returns how many there were; None if another process is at the archive.
    Raises ArchiveUnavailable."""
    with archive_lock(database, wait_seconds=WAIT_SECONDS) as is_taken:
        return Archive(url).erase(tenant_id, person) if is_taken else None
