"""`celeriac doctor`: examines the installation and says what to do about what it finds."""

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from celeriac.options import json_option, print_json

if TYPE_CHECKING:
    from celeriac.examination.results import CheckResult
    from settings import Settings

STYLE_BY_LEVEL = {"ok": "green", "warn": "yellow", "fail": "red"}
EXIT_CODE_BY_LEVEL = {"ok": 0, "warn": 1, "fail": 2}


@click.command()
@click.option("--url", help="URL of the API.  [default: CELERIAC_API_URL, else that of `celeriac up` in this folder]")
@json_option
def doctor(url: str | None, as_json: bool) -> None:
    """Examine this machine, the database, Redis, models, workers and the API.

    Each line says how a check went, and after the arrow, what to do. The servers are those that `celeriac up` started
    in this folder, or those that CELERIAC_DATABASE_URL and CELERIAC_REDIS_URL name. Nothing is changed.

    The exit code is 0 if all is well, 1 if there are warnings, and 2 if something does not work.
    """
    results = []
    for result in examine(url):
        results.append(result)
        if not as_json:
            click.echo(_line(result))
    worst = max((result.level for result in results), key=EXIT_CODE_BY_LEVEL.__getitem__)
    if as_json:
        print_json({"status": worst, "checks": [result.as_dict() for result in results]})
    sys.exit(EXIT_CODE_BY_LEVEL[worst])


def examine(url: str | None) -> Iterator["CheckResult"]:
    """The result of every check, in order. Checks that depend on one that failed are left out."""
    from celeriac.examination.results import fail
    from celeriac.terminal import explain

    try:
        from celeriac.examination.machine import version_results

        yield from version_results()
        from local.lock import settings_here

        settings = settings_here()
    except Exception as exc:
        message = explain(exc)
        if message is None:
            raise
        yield fail("settings", message, "docs/operations.md lists all settings")
        return
    yield from _examine(settings, url)


def _examine(settings: "Settings", url: str | None) -> Iterator["CheckResult"]:
    from celeriac.examination import broker, database, machine

    yield from machine.setting_results(settings)
    yield from machine.data_folder_results(settings)
    yield from machine.model_results(settings)
    yield from machine.port_results(settings)
    yield from database.database_results(settings)
    yield from broker.broker_results(settings)
    yield from machine.api_results(settings, url or _known_url(settings))


def _known_url(settings: "Settings") -> str | None:
    from celeriac.checks import api_url

    try:
        return api_url(settings)
    except click.ClickException:
        return None


def _line(result: "CheckResult") -> str:
    level = click.style(f"{result.level:<4}", fg=STYLE_BY_LEVEL[result.level])
    remedy = f"\n      -> {result.remedy}" if result.remedy else ""
    return f"{level}  {result.name}: {result.seen}{remedy}"
