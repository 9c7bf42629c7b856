"""What is checked before a command goes on: users get one line that says what to do, as a ClickException."""

import os
from contextlib import suppress
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from domain.catalog import Catalog
    from settings import Settings


def read_catalog(settings: "Settings") -> "Catalog":
    """Raises ClickException."""
    try:
        return settings.load_catalog()
    except OSError as exc:
        raise click.ClickException(
            f"CELERIAC_MODELS_FILE is {settings.models_file}: {exc.strerror}; give the path of a models.toml"
        ) from exc
    except ValueError as exc:
        raise click.ClickException(str(exc)) from exc


def refuse_unknown_models(settings: "Settings") -> None:
    catalog = read_catalog(settings)
    for model in settings.worker_models:
        catalog.get(model)


def refuse_unknown_default(settings: "Settings", catalog: "Catalog") -> None:
    from domain.model_sources import known_models

    name = settings.default_model
    if name is None or name in {entry.id for entry in catalog.entries} | catalog.unavailable.keys():
        return
    remedy = f"pull it: celeriac models pull {name}" if name in known_models() else "see celeriac models list"
    raise click.ClickException(f"there is no model {name!r} here; {remedy}")


def refuse_shared_sessions(settings: "Settings") -> None:
    """If the database does not answer yet, the process itself waits for it."""
    from sqlalchemy.exc import OperationalError

    from storage.database import database_url, refuse_shared_sessions

    with suppress(OperationalError):
        refuse_shared_sessions(database_url(settings.database_url))


def refuse_taken_port(setting: str, host: str, port: int) -> None:
    """Raise ClickException if we cannot listen there. `setting` names the setting for the port."""
    import socket

    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.create_server((host, port), family=family):
            return
    except (OSError, OverflowError) as exc:
        number = exc.errno if isinstance(exc, OSError) and exc.errno else 0
        reason = os.strerror(number) if number > 0 else str(exc)
        raise click.ClickException(f"cannot listen on {host}:{port} ({reason}); choose another {setting}") from exc


def api_url(settings: "Settings") -> str:
    """The URL of this folder's API. Does not guess the default port, where something else may be listening."""
    from settings import find_running

    if settings.api_url is not None:
        return settings.api_url
    running = find_running(settings.data_dir)
    if running is not None and "api_url" in running:
        return str(running["api_url"])
    if settings.model_fields_set & {"host", "port"}:
        return f"http://{settings.host}:{settings.port}"
    if running is not None:
        raise click.ClickException("`celeriac up` is still starting here; try again when it says that it is up")
    raise click.ClickException(
        "`celeriac up` is not running in this folder, and no API is named; start it, "
        "or name an API with --url or CELERIAC_API_URL"
    )
