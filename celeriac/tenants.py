"""`celeriac tenants`: create, limit, disable and erase. Each command imports what it needs when it runs."""

from typing import TYPE_CHECKING, Any

import click

from celeriac.access_options import limit_options, limits_given, transaction, user_here
from celeriac.options import json_option, print_json

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from storage.administration import TenantChanges
    from storage.tables import Tenant


@click.group()
def tenants() -> None:
    """Create, limit and disable tenants.

    A tenant owns jobs, files and keys, and sees nobody else's. Requests without a key belong to the tenant `default`.
    What these commands change holds for every API process within five seconds.

    \b
    celeriac tenants create research --weight 2 --tokens-per-day 5000000
    celeriac keys create --tenant research
    celeriac tenants limit research --queued-jobs 500
    celeriac tenants audit
    """


def standing_options(command: Any) -> Any:
    """--weight, --max-priority and --retention-seconds."""
    text = (
        "How long its finished jobs are kept at most, whatever their result_ttl: 60 to 315360000.  [default: 315360000]"
    )
    command = click.option("--retention-seconds", type=click.IntRange(60, 315_360_000), help=text)(command)
    text = "How far the priority of its jobs counts among those of other tenants, 0 to 10."
    command = click.option("--max-priority", type=click.IntRange(0, 10), help=text)(command)
    text = "Its share of the slots while others wait, relative to theirs.  [default: 1]"
    return click.option("--weight", type=click.FloatRange(0.001, 1000), help=text)(command)


@tenants.command("create")
@click.argument("name")
@standing_options
@limit_options
@json_option
def create_tenant(name: str, as_json: bool, **options: Any) -> None:
    """Create the tenant NAME. It needs a key next: celeriac keys create --tenant NAME."""
    from local.lock import settings_here
    from storage import administration

    changes = _changes(options)
    with transaction(settings_here()) as session:
        view = _view(session, administration.create_tenant(session, name, changes, actor=user_here()))
    message = f"Tenant {name} is created; give it a key: celeriac keys create --tenant {name}"
    print_json(view) if as_json else click.echo(message)


@tenants.command("list")
@json_option
def list_tenants(as_json: bool) -> None:
    """List all tenants with their limits."""
    from celeriac.access_tables import tenants_table
    from celeriac.tables import show
    from local.lock import settings_here
    from storage import administration

    with transaction(settings_here()) as session:
        views = [_view(session, tenant) for tenant in administration.list_tenants(session)]
    print_json(views) if as_json else show(tenants_table(views))


@tenants.command("show")
@click.argument("name")
@json_option
def show_tenant(name: str, as_json: bool) -> None:
    """Show the tenant NAME with its limits, and what is left of these."""
    from celeriac.access_tables import tenants_table
    from celeriac.tables import show
    from local.lock import settings_here
    from storage import administration
    from storage.limits_left import left_to_tenant

    with transaction(settings_here()) as session:
        tenant = administration.find_tenant(session, name)
        _, left = left_to_tenant(session, tenant)
        view = _view(session, tenant) | {"left": left}
    print_json(view) if as_json else show(tenants_table([view]))


@tenants.command("limit")
@click.argument("name")
@standing_options
@limit_options
@json_option
def limit_tenant(name: str, as_json: bool, **options: Any) -> None:
    """Set or remove limits of the tenant NAME; those that are not named stay.

    They are for all its keys together; a key may have limits of its own (celeriac keys limit).

    \b
    celeriac tenants limit research --requests-per-minute 600 --tokens-per-month 100000000
    celeriac tenants limit research --requests-per-minute none
    """
    changes = _changes(options)
    if not changes.as_json():
        raise click.UsageError("name a limit, such as --requests-per-minute 60; --help lists all of them")
    _change(name, changes, as_json, f"The limits of {name} are set.")


@tenants.command("rename")
@click.argument("name")
@click.argument("new_name")
@json_option
def rename_tenant(name: str, new_name: str, as_json: bool) -> None:
    """Call the tenant NAME by another name. Its keys, jobs, limits and usage stay its own."""
    from storage.administration import TenantChanges

    _change(name, TenantChanges(name=new_name), as_json, f"Tenant {name} is now named {new_name}.")


@tenants.command("disable")
@click.argument("name")
@json_option
def disable_tenant(name: str, as_json: bool) -> None:
    """Stop accepting the keys of the tenant NAME, until it is enabled again.

    Its jobs go on; lines of its batches that are not jobs yet wait.
    """
    from storage.administration import TenantChanges

    _change(name, TenantChanges(is_enabled=False), as_json, f"Tenant {name} is disabled.")


@tenants.command("enable")
@click.argument("name")
@json_option
def enable_tenant(name: str, as_json: bool) -> None:
    """Accept the keys of the tenant NAME again."""
    from storage.administration import TenantChanges

    _change(name, TenantChanges(is_enabled=True), as_json, f"Tenant {name} is enabled.")


@tenants.command("delete")
@click.argument("name")
@json_option
def delete_tenant(name: str, as_json: bool) -> None:
    """Delete the tenant NAME with its keys, files and webhooks; refused while it has jobs."""
    from local.lock import settings_here
    from storage import administration

    with transaction(settings_here()) as session:
        administration.delete_tenant(session, name, actor=user_here())
    if as_json:
        print_json({"id": name, "object": "tenant", "deleted": True})
    else:
        click.echo(f"Tenant {name} is deleted.")


@tenants.command("erase")
@click.argument("name")
@click.option(
    "--metadata", metavar="NAME=VALUE", help="What the user's jobs, batches and conversations have in common."
)
@click.option("--key", "key_id", metavar="ID", help="The API key that the user's jobs and batches were sent with.")
@click.option("--yes", "is_sure", is_flag=True, help="Do not ask whether to go on.")
@json_option
def erase(name: str, metadata: str | None, key_id: str | None, is_sure: bool, as_json: bool) -> None:
    """Erase all that one user of the tenant NAME has asked for and got.

    Jobs go with their input and output, batches with their files, conversations with their items; usage records stay.
    Batches that run are asked to stop, and maintenance erases them when they have. Files with lines of the user and of
    others are named, to be deleted by hand. Interrupted, it goes on by itself; repeating the command shows how far it
    is. From an archive, jobs are erased by who has CELERIAC_ARCHIVE_URL: this command, or else maintenance.

    \b
    celeriac tenants erase research --metadata user=u-4711
    celeriac tenants erase research --key 7fZkQ2 --yes
    """
    from celeriac.erasing import erase_person, person_of
    from local.lock import settings_here
    from storage import administration

    settings, person = settings_here(), person_of(metadata, key_id)
    with transaction(settings) as session:
        administration.find_tenant(session, name)
    if not is_sure:
        click.confirm("What is erased cannot be brought back. Go on?", abort=True)
    erased = erase_person(settings, name, person)
    if as_json:
        print_json(erased)
        return
    counts = "{jobs} jobs, {batches} batches and {conversations} conversations".format_map(erased)
    click.echo(f"Erased {counts}.")
    if erased["unfinished_batches"]:
        click.echo(f"{erased['unfinished_batches']} batches are stopping; maintenance erases them when they have.")
    if erased["error"]:
        click.echo(f"Maintenance tries the rest again: {erased['error']}")
    if erased["files_to_delete"]:
        click.echo(f"These files also contain lines of others: {' '.join(erased['files_to_delete'])}")


@tenants.command("audit")
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_default=True)
@json_option
def show_audit(limit: int, as_json: bool) -> None:
    """Show what was changed about tenants and keys, newest first."""
    from celeriac.access_tables import audit_table
    from celeriac.tables import show
    from dialects.administration import audit_entry_view
    from local.lock import settings_here
    from storage import administration

    with transaction(settings_here()) as session:
        views = [audit_entry_view(entry) for entry in administration.list_audit(session, limit=limit)]
    print_json(views) if as_json else show(audit_table(views))


def _change(name: str, changes: "TenantChanges", as_json: bool, message: str) -> None:
    from local.lock import settings_here
    from storage import administration

    with transaction(settings_here()) as session:
        view = _view(session, administration.change_tenant(session, name, changes, actor=user_here()))
    print_json(view) if as_json else click.echo(message)


def _changes(options: dict[str, Any]) -> "TenantChanges":
    """From `standing_options` and `limit_options`."""
    from storage.administration import TenantChanges

    standing = {name: options[name] for name in ("weight", "max_priority", "retention_seconds")}
    return TenantChanges(**standing, limits=limits_given())


def _view(session: "Session", tenant: "Tenant") -> dict[str, Any]:
    from dialects.administration import tenant_admin_view
    from storage import limits

    return {**tenant_admin_view(tenant, limits.limits_of_tenants(session, [tenant])[tenant.id])}
