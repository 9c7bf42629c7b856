"""`celeriac queue`, `workers` and `top`: what runs and what waits. Each command imports what it needs when it runs."""

import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from celeriac.options import connection_options, json_option, open_client, print_json

if TYPE_CHECKING:
    from rich.console import RenderableType

    from celeriac.client import Client

ADMINS_ONLY = 403


@click.command()
@connection_options
@json_option
def queue(url: str | None, key: str | None, as_json: bool) -> None:
    """Show the queue of every model: how many jobs wait, for what, and for how long."""
    from celeriac.tables import queues_table, show

    with open_client(url, key) as client:
        queues = client.queues()
    print_json(queues) if as_json else show(queues_table(queues))


@click.command()
@connection_options
@json_option
def workers(url: str | None, key: str | None, as_json: bool) -> None:
    """List the live GPU workers, with the models that each serves and how far loads have come.

    If keys are required, this needs an admin key.
    """
    from celeriac.tables import show, workers_table

    with open_client(url, key) as client:
        statuses = client.model_statuses()
    if as_json:
        print_json(statuses)
    elif not any(model["workers"] for model in statuses):
        click.echo("No worker is alive; start one: celeriac worker", err=True)
    else:
        show(workers_table(statuses))


@click.command()
@click.option("--interval", type=click.FloatRange(0.2, 3600), default=2.0, show_default=True, metavar="SECONDS")
@click.option("--once", is_flag=True, help="Show it once and end.")
@connection_options
@json_option
def top(interval: float, once: bool, url: str | None, key: str | None, as_json: bool) -> None:
    """Watch the installation: queues, workers, tokens per second, and what is wrong. Ctrl-C ends it.

    In a pipe, or with --json, each look is printed after the previous one. Workers are shown to admins only.
    """
    with open_client(url, key) as client:
        if as_json:
            _print_looks(client, interval, once=once)
        else:
            _show_looks(client, interval, once=once)


def _print_looks(client: "Client", interval: float, *, once: bool) -> None:
    while True:
        print_json(look(client))
        if once:
            return
        time.sleep(interval)


def _show_looks(client: "Client", interval: float, *, once: bool) -> None:
    """On a terminal in its place; elsewhere one after the other. An API that goes away is waited for."""
    from rich.live import Live
    from rich.markup import escape

    from celeriac.client import ClientError
    from celeriac.consoles import VisibleConsole
    from celeriac.tables import PIPE_WIDTH

    console = VisibleConsole(highlight=False)
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    if once or not console.is_terminal:
        while True:
            console.print(_drawn(look(client), console.width))
            if once:
                return
            time.sleep(interval)
    with Live(_drawn(look(client), console.width), console=console, auto_refresh=False) as live:
        while True:
            time.sleep(interval)
            try:
                live.update(_drawn(look(client), console.width), refresh=True)
            except ClientError as exc:
                live.update(escape(str(exc)), refresh=True)


def look(client: "Client") -> dict[str, Any]:
    """The installation at this moment. `workers` is null if the key is no admin's."""
    from celeriac.client import ApiError

    health, queues = client.health(), client.queues()
    try:
        models = client.model_statuses()
    except ApiError as exc:
        if exc.status_code != ADMINS_ONLY:
            raise
        models = None
    return {
        "at": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "url": client.url,
        "health": health,
        "queues": queues,
        "workers": None if models is None else [{"model": m["id"], **w} for m in models for w in m["workers"]],
    }


def _drawn(seen: dict[str, Any], width: int) -> "RenderableType":
    from rich.console import Group
    from rich.markup import escape

    from celeriac.tables import fitted, queues_table, workers_table

    health, queues = seen["health"], seen["queues"]
    rate = sum(queue["tokens_per_second"] for queue in queues if queue["running"])
    headline = (
        f"{escape(seen['url'])}  {health['status']}  {health['queue_size']} queued, {health['running']} running, "
        f"{rate:.0f} tokens/s, {health['streams']} streams  {seen['at'][11:19]} UTC"
    )
    problems = [f"! {escape(reason)}" for reason in health["reasons"]]
    parts: list[RenderableType] = [headline, *problems, "", fitted(queues_table(queues), width)]
    if seen["workers"]:
        models = [{"id": worker["model"], "workers": [worker]} for worker in seen["workers"]]
        parts += ["", fitted(workers_table(models), width)]
    return Group(*parts)
