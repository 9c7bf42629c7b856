"""What commands share: --url and --key for the API that they talk to, and --json for the output of programs."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from celeriac.client import Client

#: Whether this is a checkout. `pip install celeriac` installs only the client and the commands that use it.
HAS_SERVER = (Path(__file__).parents[1] / "storage").is_dir()  # not gpu_worker, which the image of the API lacks


def connection_options(command: Any) -> Any:
    """--url and --key."""
    command = click.option("--key", help="API key.  [default: CELERIAC_API_KEY]")(command)
    text = "URL of the API.  [default: CELERIAC_API_URL, else that of `celeriac up` in this folder]"
    return click.option("--url", help=text)(command)


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")


def print_json(value: Any) -> None:
    """One line of JSON on standard output."""
    click.echo(json.dumps(value, ensure_ascii=False, default=str))


def open_client(url: str | None, key: str | None) -> "Client":
    """Raises ClickException if no API is named and none runs in this folder."""
    from celeriac.client import Client

    if not HAS_SERVER:
        return Client(url, key)
    from celeriac.checks import api_url
    from settings import get_settings

    settings = get_settings()
    return Client(url or api_url(settings), key or settings.api_key)
