"""`celeriac usage`: what was used, as a table, CSV or JSON. Imports what it needs when it runs."""

from typing import TYPE_CHECKING, Any

import click

from celeriac.options import connection_options, json_option, open_client, print_json

if TYPE_CHECKING:
    from rich.table import Table

GROUPS = ("day", "tenant", "key", "model")

#: The columns of the table, by the names of the figures. CSV and JSON have all figures.
COLUMNS = {
    "num_jobs": "Jobs",
    "prompt_tokens": "Prompt tokens",
    "cached_tokens": "Cached",
    "output_tokens": "Output tokens",
    "engine_seconds": "Engine s",
}


def usage_table(usage: dict[str, Any], groups: list[str]) -> "Table":
    """One row per group and, if there are several, their sum."""
    from rich.markup import escape
    from rich.table import Table

    has_costs = usage["total"]["cost"] is not None
    table = Table(box=None, pad_edge=False, show_footer=len(usage["data"]) > 1)
    for place, group in enumerate(groups):
        table.add_column(group.capitalize(), footer="Total" if place == 0 else "")
    total = _figures(usage["total"], has_costs)
    names = [*COLUMNS.values(), *([f"Cost in {usage['currency']}"] if has_costs else [])]
    for name, footer in zip(names, total, strict=True):
        table.add_column(name, footer=footer, justify="right")
    for row in usage["data"]:
        table.add_row(*(escape(str(row[group] or "-")) for group in groups), *_figures(row, has_costs))
    return table


def _figures(row: dict[str, Any], has_costs: bool) -> list[str]:
    cells = [f"{row[name]:,.1f}" if isinstance(row[name], float) else f"{row[name]:,}" for name in COLUMNS]
    return [*cells, row["cost"] or "-"] if has_costs else cells


def write_csv(usage: dict[str, Any], groups: list[str]) -> None:
    """To standard output. The columns are the same if there are no rows."""
    import csv
    import sys

    writer = csv.writer(sys.stdout)
    names = usage["data"][0] if usage["data"] else [*groups, *usage["total"]]
    writer.writerow([*names, "currency"])
    for row in usage["data"]:
        writer.writerow([*("" if cell is None else cell for cell in row.values()), usage["currency"]])


@click.command()
@click.option("--by", default="model", show_default=True, help="Any of day, tenant, key, model, with commas.")
@click.option("--start", metavar="DATE", help="From then on, such as 2026-10-20.  [default: 30 days ago]")
@click.option("--end", metavar="DATE", help="Until then, exclusively.  [default: now]")
@click.option("--tenant", help="Only this tenant.")
@click.option("--model", help="Only this model.")
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV.")
@connection_options
@json_option
def usage(
    by: str,
    start: str | None,
    end: str | None,
    tenant: str | None,
    model: str | None,
    as_csv: bool,
    url: str | None,
    key: str | None,
    as_json: bool,
) -> None:
    """Show what was used: jobs, tokens, the engines' time, and the cost if models.toml has prices. The key of an admin
    shows all tenants.

    \b
    celeriac usage                             by model, in the last 30 days
    celeriac usage --by tenant,day --csv       for a spreadsheet
    """
    from celeriac.tables import show

    groups = [name for name in GROUPS if name in {one.strip() for one in by.split(",")}]
    with open_client(url, key) as client:
        found = client.usage(group_by=by, start=start, end=end, tenant=tenant, model=model)
    if as_json:
        print_json(found)
    elif as_csv:
        write_csv(found, groups)
    elif not found["data"]:
        click.echo("Nothing was used in this time.", err=True)
    else:
        show(usage_table(found, groups))
