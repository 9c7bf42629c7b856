"""What `celeriac tenants erase` does: it asks for the erasure, and takes its steps itself, beside maintenance."""

import time
from typing import TYPE_CHECKING, Any

import click

from celeriac.access_options import transaction, user_here
from dialects.erasures import erasure_view
from maintenance.erasing import Eraser
from storage import administration, erasures
from storage.database import open_database
from storage.erasure import Person
from storage.erasures import Erasure

if TYPE_CHECKING:
    from settings import Settings

LOOK_SECONDS = 0.1  # while another process takes a step, or is at the archive


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
    """The erasure, which is over, or waits for batches to stop or for the archive. Raises NotFound."""
    with transaction(settings) as session:
        tenant = administration.find_tenant(session, tenant_name)
        erasure_id = erasures.ask(session, tenant, person, actor=user_here()).id
    database = open_database(settings.database_url)
    eraser = Eraser(database, settings.archive_url)
    try:
        while True:
            step = eraser.take_step(erasure_id)
            with transaction(settings) as session:
                erasure = session.get_one(Erasure, erasure_id)
                if erasure.is_done or erasure.error or (step is not None and erasure.is_waiting):
                    return dict(erasure_view(erasure))
            time.sleep(LOOK_SECONDS if step is None or erasure.step == "archive" else 0)
    finally:
        database.dispose()
