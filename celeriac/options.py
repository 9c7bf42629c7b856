"""What commands share: --url and --key for the API that they talk to, and --json for the output of programs."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from celeriac.client import Client

#: Whether this is a checkout. `pip install celeriac` installs only the client and the commands that use it.
HAS_SERVER = (Path(__file__).parents[1] / "storage").is_dir()  # not gpu_worker, which the image of the API lacks


class Commands(click.Group):
    """Commands in the order in which they are defined. Where only the client is installed, the others say so."""

    #: Those that only talk to an API.
    client_commands: frozenset[str] = frozenset()

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for name in self.commands if HAS_SERVER or name in self.client_commands]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in self.commands:
            self.refuse_without_server(ctx, cmd_name)
        return super().get_command(ctx, cmd_name)

    def refuse_without_server(self, ctx: click.Context, cmd_name: str) -> None:
        """Raises ClickException."""
        if not HAS_SERVER and cmd_name not in self.client_commands:
            path = " ".join(["celeriac", *ctx.command_path.split()[1:], cmd_name])
            raise click.ClickException(
                f"`{path}` needs the server, but only the client is installed here; run it in a checkout, "
                "where make run installs it"
            )


def connection_options(command: Any) -> Any:
    """--url and --key."""
    command = click.option("--key", help="API key.  [default: CELERIAC_API_KEY]")(command)
    text = "URL of the API.  [default: CELERIAC_API_URL, else that of `celeriac up` in this folder]"
    return click.option("--url", help=text)(command)


SECONDS = click.FloatRange(0, min_open=True)

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")


def print_json(value: Any) -> None:
    """One line of JSON on standard output, which takes every character in UTF-8 only."""
    is_utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    click.echo(json.dumps(value, ensure_ascii=not is_utf8, default=str))


def open_client(url: str | None, key: str | None) -> "Client":
    """Raises ClickException if no API is named and none runs in this folder."""
    from celeriac.client import Client

    return Client(*connection(url, key))


def connection(url: str | None, key: str | None) -> tuple[str, str | None]:
    """The URL of the API, and the key for it. Raises ClickException if no API is named and none runs in this folder."""
    if not HAS_SERVER:
        from celeriac.client.protocol import url_of_api

        return url_of_api(url), key
    from celeriac.checks import api_url
    from settings import get_settings

    settings = get_settings()
    return url or api_url(settings), key or settings.api_key
