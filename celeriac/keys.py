"""`celeriac keys`: create, limit and end API keys. Each command imports what it needs when it runs."""

from typing import TYPE_CHECKING, Any

import click

from celeriac.access_options import in_words, limit_options, limits_given, transaction, user_here
from celeriac.options import json_option, print_json

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from storage.tables import ApiKey

PRIORITY = click.option(
    "--max-priority",
    type=click.IntRange(0, 10),
    help="How far the priority of its jobs counts among those of other tenants, 0 to 10: no further than its tenant's.",
)

SCOPES = ("submit", "read", "cancel", "metrics", "admin")


@click.group()
def keys() -> None:
    """Create, limit and end API keys.

    Requests need one if CELERIAC_AUTH=api_key. A key has the form sk_<id>_<secret>; these commands take the id. What
    they change holds for every API process within five seconds, and for streams that are open. `celeriac tenants audit`
    shows who changed what.

    \b
    export CELERIAC_API_KEY=$(celeriac keys create --name laptop)
    celeriac keys create --tenant research --scope read --days 90
    celeriac keys limit KEY_ID --requests-per-minute 60 --tokens-per-day 1000000
    celeriac keys rotate KEY_ID --keep-old-minutes 60
    """


@keys.command("create")
@click.option("--name", default="", help="What the key is for.")
@click.option("--tenant", default="default", show_default=True, help="Tenant that owns the key; created if new.")
@click.option("--days", type=click.IntRange(1, 3650), help="Number of days until it expires.  [default: never]")
@click.option(
    "--scope",
    "scopes",
    type=click.Choice(SCOPES),
    multiple=True,
    help="What it may be used for; may be given several times.  [default: submit, read and cancel]",
)
@click.option("--admin", "is_admin", is_flag=True, help="Add the scope admin: /v1/admin and /metrics.")
@PRIORITY
@limit_options
@json_option
def create_key(
    name: str,
    tenant: str,
    days: int | None,
    scopes: tuple[str, ...],
    is_admin: bool,
    max_priority: int | None,
    as_json: bool,
    **_: int | None,
) -> None:
    """Create a key and print it. It is shown only this once."""
    from datetime import UTC, datetime, timedelta

    from domain.access import OWN_SCOPES, Scope
    from local.lock import settings_here
    from storage import administration, tenants
    from storage.administration import TenantChanges

    given = {Scope(scope) for scope in scopes} or set(OWN_SCOPES)
    actor = user_here()
    with transaction(settings_here()) as session:
        owner = tenants.get_tenant_by_name(session, tenant) or administration.create_tenant(
            session, tenant, TenantChanges(), actor=actor
        )
        new = administration.create_key(
            session,
            owner,
            name=name,
            expires_at=datetime.now(UTC) + timedelta(days=days) if days else None,
            scopes=given | {Scope.ADMIN} if is_admin else given,
            max_priority=max_priority,
            key_limits=limits_given(),
            actor=actor,
        )
        print_json(_view(session, new.row) | {"key": new.text}) if as_json else click.echo(new.text)


@keys.command("list")
@click.option("--tenant", default="default", show_default=True)
@click.option("--all", "is_of_all", is_flag=True, help="List the keys of all tenants.")
@json_option
def list_keys(tenant: str, is_of_all: bool, as_json: bool) -> None:
    """List a tenant's keys, newest first; secrets are not stored and cannot be shown."""
    from celeriac.access_tables import keys_table
    from celeriac.tables import show
    from local.lock import settings_here
    from storage import administration

    with transaction(settings_here()) as session:
        owner = None if is_of_all else administration.find_tenant(session, tenant).id
        views = [_view(session, key) for key in administration.list_keys(session, tenant_id=owner)]
    if as_json:
        print_json(views)
    elif views:
        show(keys_table(views))
    else:
        click.echo(f"{tenant} has no keys yet; create one: celeriac keys create --tenant {tenant}", err=True)


@keys.command("show")
@click.argument("key_id")
@json_option
def show_key(key_id: str, as_json: bool) -> None:
    """Show a key with its scopes and limits, and what is left of these."""
    from local.lock import settings_here
    from storage import administration
    from storage.limits_left import left_to_key

    with transaction(settings_here()) as session:
        key = administration.find_key(session, key_id)
        _, left = left_to_key(session, key.tenant_id, key.id)
        view = _view(session, key) | {"left": left}
    if as_json:
        print_json(view)
        return
    del view["left"]
    texts = view | {"scopes": ", ".join(view["scopes"]), "limits": in_words(view["limits"], left) or None}
    for name, text in texts.items():
        click.echo(f"{name:12} {'none' if text is None else text}")


@keys.command("limit")
@click.argument("key_id")
@PRIORITY
@limit_options
@json_option
def limit_key(key_id: str, max_priority: int | None, as_json: bool, **_: int | None) -> None:
    """Set or remove limits of a key; those that are not named stay.

    The limits of its tenant apply as well.

    \b
    celeriac keys limit KEY_ID --requests-per-minute 60
    celeriac keys limit KEY_ID --requests-per-minute none
    """
    if not limits_given().model_fields_set and max_priority is None:
        raise click.UsageError("name a limit, such as --requests-per-minute 60; --help lists all of them")
    _change(key_id, as_json, f"The limits of {key_id} are set.", max_priority=max_priority)


@keys.command("rename")
@click.argument("key_id")
@click.argument("name")
@json_option
def rename_key(key_id: str, name: str, as_json: bool) -> None:
    """Give a key another NAME, which says what it is for."""
    _change(key_id, as_json, f"Key {key_id} is now named {name!r}.", name=name)


@keys.command("disable")
@click.argument("key_id")
@json_option
def disable_key(key_id: str, as_json: bool) -> None:
    """Stop accepting a key, until it is enabled again. Its jobs go on."""
    _change(key_id, as_json, f"Key {key_id} is disabled.", is_enabled=False)


@keys.command("enable")
@click.argument("key_id")
@json_option
def enable_key(key_id: str, as_json: bool) -> None:
    """Accept a disabled key again."""
    _change(key_id, as_json, f"Key {key_id} is enabled.", is_enabled=True)


@keys.command("rotate")
@click.argument("key_id")
@click.option("--keep-old-minutes", type=click.IntRange(1, 10_080), help="Keep the old one valid for so long.")
@click.option("--days", type=click.IntRange(1, 3650), help="Days until the new one expires.  [default: as the old one]")
@json_option
def rotate_key(key_id: str, keep_old_minutes: int | None, days: int | None, as_json: bool) -> None:
    """Print a new key that takes this one's place.

    It has the same name, scopes and limits, and the same expiry unless --days is given. The old one stops working at
    once, unless --keep-old-minutes is given.
    """
    from datetime import UTC, datetime, timedelta

    from local.lock import settings_here
    from storage import administration

    now = datetime.now(UTC)
    until = now + timedelta(minutes=keep_old_minutes) if keep_old_minutes else None
    ends = now + timedelta(days=days) if days else None
    with transaction(settings_here()) as session:
        new = administration.rotate_key(session, key_id, keep_old_until=until, expires_at=ends, actor=user_here())
        print_json(_view(session, new.row) | {"key": new.text}) if as_json else click.echo(new.text)


@keys.command("delete")
@click.argument("key_id")
@json_option
def delete_key(key_id: str, as_json: bool) -> None:
    """Delete a key for good. Its jobs stay."""
    from local.lock import settings_here
    from storage import administration

    with transaction(settings_here()) as session:
        administration.delete_key(session, key_id, actor=user_here())
    if as_json:
        print_json({"id": key_id, "object": "api_key", "deleted": True})
    else:
        click.echo(f"Key {key_id} is deleted.")


def _change(
    key_id: str,
    as_json: bool,
    message: str,
    *,
    is_enabled: bool | None = None,
    name: str | None = None,
    max_priority: int | None = None,
) -> None:
    from local.lock import settings_here
    from storage import administration
    from storage.administration import KeyChanges

    changes = KeyChanges(is_enabled, name, max_priority, limits_given())
    with transaction(settings_here()) as session:
        view = _view(session, administration.change_key(session, key_id, changes, actor=user_here()))
    print_json(view) if as_json else click.echo(message)


def _view(session: "Session", key: "ApiKey") -> dict[str, Any]:
    from dialects.administration import api_key_view
    from storage import administration, limits

    [name] = administration.names_of_tenants(session, [key.tenant_id]).values()
    return {**api_key_view(key, name, limits.limits_of_keys(session, [key.id])[key.id])}
