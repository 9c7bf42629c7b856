"""`celeriac keys`: create, list and revoke API keys. Each command imports what it needs when it runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from uuid import UUID

    from sqlalchemy.orm import Session

    from settings import Settings


@click.group()
def keys() -> None:
    """Create, list and revoke API keys.

    Requests need one if CELERIAC_AUTH=api_key.
    """


@keys.command("create")
@click.option("--name", default="", help="What the key is for.")
@click.option("--tenant", default="default", show_default=True, help="Tenant that owns the key; created if new.")
@click.option("--days", type=click.IntRange(1), help="Number of days until it expires.  [default: never]")
@click.option("--admin", "is_admin", is_flag=True, help="Allow the key to use /v1/admin.")
def create_key(name: str, tenant: str, days: int | None, is_admin: bool) -> None:
    """Create a key and print it. It is shown only this once."""
    from datetime import UTC, datetime, timedelta

    from local.lock import settings_here
    from storage import tenants

    expires_at = datetime.now(UTC) + timedelta(days=days) if days else None
    with transaction(settings_here()) as session:
        owner = tenants.get_tenant_by_name(session, tenant) or tenants.create_tenant(session, tenant)
        click.echo(tenants.create_key(session, owner.id, name=name, expires_at=expires_at, is_admin=is_admin))


@keys.command("list")
@click.option("--tenant", default="default", show_default=True)
def list_keys(tenant: str) -> None:
    """List a tenant's keys, newest first; secrets are not stored and cannot be shown."""
    from celeriac.tables import keys_table, show
    from local.lock import settings_here
    from storage import tenants

    with transaction(settings_here()) as session:
        show(keys_table(tenants.list_keys(session, _tenant_id(session, tenant))))


@keys.command("revoke")
@click.argument("key_id")
@click.option("--tenant", default="default", show_default=True)
def revoke_key(key_id: str, tenant: str) -> None:
    """Revoke a key. KEY_ID is its middle part: sk_<id>_..."""
    from local.lock import settings_here
    from storage import tenants

    with transaction(settings_here()) as session:
        if not tenants.revoke_key(session, key_id, _tenant_id(session, tenant)):
            raise click.ClickException(f"tenant {tenant} has no live key {key_id}; list them: celeriac keys list")
    click.echo(f"Key {key_id} is revoked.")


@contextmanager
def transaction(settings: "Settings") -> Iterator["Session"]:
    """One transaction, committed at the end."""
    from storage.database import open_database, session_factory

    database = open_database(settings.database_url)
    try:
        with session_factory(database).begin() as session:
            yield session
    finally:
        database.dispose()


def _tenant_id(session: "Session", name: str) -> "UUID":
    from storage import tenants

    tenant = tenants.get_tenant_by_name(session, name)
    if tenant is None:
        raise click.ClickException(
            f"there is no tenant {name}; create it with its first key: celeriac keys create --tenant {name}"
        )
    return tenant.id
