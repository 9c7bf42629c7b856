"""What `celeriac tenants erase` does: step after step, each a transaction, until nothing of the user is left."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from uuid import UUID

import click

from celeriac.access_options import transaction, user_here
from domain.jobs import external_id
from storage import administration, erasure
from storage.erasure import Person, Step

if TYPE_CHECKING:
    from settings import Settings


def person_of(metadata: str | None, key_id: str | None) -> Person:
    if (metadata is None) == (key_id is None):
        raise click.UsageError("say whose: give either --metadata NAME=VALUE or --key ID")
    if metadata is None:
        return Person(key_id=key_id)
    name, sign, value = metadata.partition("=")
    if not (name and sign):
        raise click.UsageError(f"--metadata is {metadata[:64]!r}; give NAME=VALUE, such as user=u-4711")
    return Person(metadata=(name, value))


def erase_person(settings: "Settings", tenant_name: str, person: Person) -> dict[str, Any]:
    """How much was erased, and the ids of files that contain lines of this user and of others. Raises NotFound."""
    with transaction(settings) as session:
        tenant_id = administration.find_tenant(session, tenant_name).id
    of_batches = _all_steps(settings, tenant_id, person, erasure.erase_batches)
    of_jobs = _all_steps(settings, tenant_id, person, erasure.erase_jobs)
    of_conversations = _all_steps(settings, tenant_id, person, erasure.erase_conversations)
    erased: dict[str, Any] = {
        "jobs": sum(step.num_erased for step in of_jobs),
        "batches": sum(step.num_erased for step in of_batches),
        "conversations": sum(step.num_erased for step in of_conversations),
        "unfinished_batches": sum(step.num_unfinished for step in of_batches),
    }
    if settings.archive_url:
        erased["archived_jobs"] = _erase_archived(settings, tenant_id, person)
    by = {"key_id": person.key_id} if person.metadata is None else {"metadata": person.metadata[0]}
    with transaction(settings) as session:
        tenant = administration.find_tenant(session, tenant_name)
        administration.note_erasure(session, tenant, by | erased, actor=user_here())
        batch_ids = frozenset[UUID]().union(*(step.batch_ids for step in of_jobs))
        file_ids = erasure.files_of_others(session, batch_ids, person)
    return erased | {"files_to_delete": [external_id(id_, "file") for id_ in file_ids]}


def _erase_archived(settings: "Settings", tenant_id: UUID, person: Person) -> int:
    """After the jobs in the database, of which none can be archived any more then."""
    from maintenance.archive import erase_archived
    from storage.database import open_database

    assert settings.archive_url is not None
    database = open_database(settings.database_url)
    try:
        return erase_archived(database, settings.archive_url, tenant_id, person)
    finally:
        database.dispose()


def _all_steps(settings: "Settings", tenant_id: UUID, person: Person, erase: Callable[..., Step]) -> list[Step]:
    steps: list[Step] = []
    after: UUID | None = erasure.FIRST
    while after is not None:
        with transaction(settings) as session:
            steps.append(erase(session, tenant_id, person, after=after))
        after = steps[-1].after
    return steps
