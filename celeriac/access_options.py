"""What `celeriac keys` and `celeriac tenants` share: options for limits, and transactions on the database."""

import getpass
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from domain.access import Limits
    from settings import Settings

MEANING_BY_LIMIT = {
    "requests-per-minute": "Requests for jobs per minute.",
    "tokens-per-minute": "Tokens per minute: of prompts, and as many as may be generated.",
    "queued-jobs": "Jobs waiting at the same time.",
    "unfinished-jobs": "Jobs waiting or running at the same time.",
    "queued-tokens": "Tokens of the jobs that wait.",
    "streams": "Open streams and long polls, per API process.",
    "tokens-per-day": "Tokens used per day (UTC).",
    "tokens-per-month": "Tokens used per month (UTC).",
}


class LimitType(click.ParamType["int | None"]):
    """A whole number from 1, or `none`."""

    name = "N|none"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        if isinstance(value, int):
            return value
        text = str(value).strip().lower()
        if text == "none":
            return None
        from domain.access import MAX_LIMIT, MAX_QUEUED_JOBS

        maximum = MAX_QUEUED_JOBS if param is not None and param.name == "queued_jobs" else MAX_LIMIT
        is_number = text.isascii() and text.isdigit() and len(text) <= len(str(maximum))
        if not (is_number and 1 <= int(text) <= maximum):
            wanted = f"a whole number from 1 to {maximum}, or none to remove it"
            self.fail(f"{text[:40]!r} is not such a limit; give {wanted}", param, ctx)
        return int(text)


def limit_options(command: Any) -> Any:
    """An option for each limit, such as --tokens-per-day. `limits_given` reads them."""
    for name, meaning in reversed(MEANING_BY_LIMIT.items()):
        command = click.option(f"--{name}", type=LimitType(), help=meaning)(command)
    return command


def limits_given() -> "Limits":
    """The limits that the current command's options name, and no others."""
    from click.core import ParameterSource

    from domain.access import LIMIT_NAMES, Limits

    context = click.get_current_context()
    given = [name for name in LIMIT_NAMES if context.get_parameter_source(name) not in (None, ParameterSource.DEFAULT)]
    return Limits(**{name: context.params[name] for name in given})


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


def user_here() -> str:
    """Who uses this machine: the actor in the audit log."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container's user often has no name
        user = "unknown"
    return f"{user}@{socket.gethostname()}"


def in_words(limits: Mapping[str, int | None], left: Mapping[str, int | None] | None = None) -> str:
    """The limits that are set, and what is left of them if that is known."""
    rests = {name: f" ({number} left)" for name, number in (left or {}).items() if number is not None}
    return ", ".join(f"{name} {value}{rests.get(name, '')}" for name, value in limits.items() if value is not None)
