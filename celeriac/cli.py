"""The `celeriac` command. Every command imports what it needs when it runs, so that `--help` answers at once."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import click

from celeriac.bench import bench
from celeriac.checks import (
    read_catalog,
    refuse_shared_sessions,
    refuse_taken_port,
    refuse_unknown_default,
    refuse_unknown_models,
)
from celeriac.completion import completion
from celeriac.dead_letters import dead_letters
from celeriac.doctor import doctor
from celeriac.engines import engines
from celeriac.jobs import batch, cancel, jobs, submit, watch
from celeriac.keys import keys
from celeriac.live import queue, top, workers
from celeriac.models import models
from celeriac.options import HAS_SERVER, Commands, json_option, print_json
from celeriac.tenants import tenants
from celeriac.usage import usage

if TYPE_CHECKING:
    from settings import Settings

INTERRUPTED = 130  # the exit code after Ctrl-C, as in shells: 128 and the number of SIGINT

LOOPBACK_ADDRESSES = ("127.0.0.1", "::1", "localhost")


class MainCommands(Commands):
    client_commands = frozenset(
        {"submit", "watch", "cancel", "jobs", "batch", "dead-letters", "models", "queue", "workers", "top", "usage"}
        | {"bench", "completion"}
    )

    def invoke(self, ctx: click.Context) -> Any:
        _never_fail_to_print()
        try:
            return super().invoke(ctx)
        except click.ClickException:
            raise
        except KeyboardInterrupt:
            ctx.exit(INTERRUPTED)
        except Exception as exc:
            from celeriac.consoles import VISIBLE
            from celeriac.terminal import explain

            if message := explain(exc):
                raise click.ClickException(message.translate(VISIBLE)) from exc
            raise


HELP = """Run LLM generation as durable jobs: accepted jobs survive crashes, and broken streams resume where they
stopped.

\b
celeriac up                                everything on this machine, with a first job
celeriac submit "What is 17 + 25?"         run a job and watch its text arrive
celeriac jobs                              list jobs, newest first

`celeriac up` starts its own PostgreSQL and Redis unless you give the URLs of yours. The other commands use
CELERIAC_DATABASE_URL and CELERIAC_REDIS_URL if those are set, and otherwise the servers that `celeriac up` started
in this folder. Every setting is an environment variable; docs/operations.md lists them. docs/command_line.md has
the exit codes.
"""

CLIENT_HELP = """Use a Celeriac server: accepted jobs survive crashes, and broken streams resume where they stopped.

\b
export CELERIAC_API_URL=https://...        the server; its administrator knows it
export CELERIAC_API_KEY=sk_...             your key, if the server asks for one
celeriac submit "What is 17 + 25?"         run a job and watch its text arrive
celeriac jobs                              list jobs, newest first

Only the client is installed here. The commands that run and administer a server come with a checkout of Celeriac, where
`make run` installs and starts everything.
"""


@click.group(
    cls=MainCommands,
    help=HELP if HAS_SERVER else CLIENT_HELP,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="celeriac")
def main() -> None:
    pass


# The system


@main.command()
@click.option("--model", help="Model to serve, also for requests that name none.  [default: the first one]")
@click.option("--first-job/--no-first-job", default=True, help="Run one job at the start and show its text.")
def up(model: str | None, first_job: bool) -> None:
    """Start everything here and keep it running until Ctrl-C.

    This starts PostgreSQL and Redis (embedded, unless their URLs are set), brings the schema up to date, and starts the
    API, one GPU worker (and one more for each model with autostart = true), maintenance and Flower. Processes that die
    are restarted. Logs and data are in .celeriac. If a port is taken, the next free one is used.
    """
    from api.exposure import refuse_development_settings
    from celeriac.up import Up
    from domain.errors import ModelUnavailable
    from settings import get_settings

    _set("CELERIAC_DEFAULT_MODEL", model)
    settings = get_settings()
    with _explained(ValueError):
        refuse_development_settings(settings)
    catalog = read_catalog(settings)
    refuse_unknown_default(settings, catalog)
    with _explained(ModelUnavailable):
        _ = catalog.first  # raise now if no model is available, instead of starting a worker that cannot start
    Up(settings, with_first_job=first_job).run()


@main.command()
@click.option("--host", help="Address to listen on.  [default: CELERIAC_HOST or 127.0.0.1]")
@click.option("--port", type=int, help="Port to listen on.  [default: CELERIAC_PORT or 8000]")
@click.option(
    "--processes", type=int, help="Processes that share the port, one per core.  [default: CELERIAC_API_PROCESSES or 1]"
)
def api(host: str | None, port: int | None, processes: int | None) -> None:
    """Serve the HTTP API."""
    _set("CELERIAC_HOST", host)
    _set("CELERIAC_PORT", port)
    _set("CELERIAC_API_PROCESSES", processes)
    _name_in_traces("api")
    settings = _settings()
    from api.exposure import refuse_development_settings
    from api.server import serve

    with _explained(ValueError):
        refuse_development_settings(settings)
        read_catalog(settings)
    refuse_shared_sessions(settings)
    refuse_taken_port("CELERIAC_PORT", settings.host, settings.port)
    sys.exit(serve(settings))


@main.command()
@click.option(
    "--model", "models_", multiple=True, help="Model to serve; may be given several times.  [default: the first one]"
)
@click.option(
    "--memory",
    metavar="SIZE",
    help="What its models may take together, such as 20GiB.  [default: 90 % of what there is]",
)
@click.option("--name", help="Node name; must be unique in the installation.  [default: a random one]")
@click.option("--gpus", metavar="all|0,2", help="Run one worker for each of these GPUs, until all of them have ended.")
def worker(models_: tuple[str, ...], memory: str | None, name: str | None, gpus: str | None) -> None:
    """Run one GPU worker, with an engine process for each model that is loaded.

    \b
    celeriac worker --model qwen3-8b                     one model, always loaded
    celeriac worker --model a --model b --memory 20GiB   those that fit; others are loaded when jobs wait
    celeriac worker --gpus all                           one worker per GPU
    """
    _set("CELERIAC_WORKER_MODEL", ",".join(models_) or None)
    _set("CELERIAC_WORKER_MEMORY", memory)
    _set("CELERIAC_WORKER_NAME", name)
    _name_in_traces("worker")
    settings = _settings()
    refuse_unknown_models(settings)
    refuse_shared_sessions(settings)
    if gpus is not None:
        from celeriac.worker_group import run_workers

        sys.exit(run_workers(settings, gpus))
    _become_celery("gpu_worker.app", "worker")


@main.command()
def maintenance() -> None:
    """Run the background work that keeps jobs moving.

    Every second the janitor dispatches, rescues, expires and prunes the jobs that were left behind, batches advance,
    and webhooks are sent. /health and /metrics are on CELERIAC_MAINTENANCE_PORT.
    """
    _name_in_traces("maintenance")
    settings = _settings()
    from maintenance.process import serve

    read_catalog(settings)
    refuse_shared_sessions(settings)
    try:
        serve(settings)
    except OSError as exc:
        raise click.ClickException(
            f"CELERIAC_MAINTENANCE_PORT is {settings.maintenance_port}: {exc.strerror}; choose another, or 0 for any"
        ) from exc


@main.command()
@click.option("--address", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=int, help="Port to listen on.  [default: CELERIAC_FLOWER_PORT or 5555]")
def flower(address: str, port: int | None) -> None:
    """Serve Flower, which shows GPU workers and their tasks.

    To listen beyond this machine, set FLOWER_BASIC_AUTH=user:password in the environment.
    """
    if address not in LOOPBACK_ADDRESSES and not os.environ.get("FLOWER_BASIC_AUTH"):
        raise click.UsageError(
            f"anyone who can reach Flower on {address} could cancel jobs and stop workers; "
            "set FLOWER_BASIC_AUTH=user:password, or keep it on 127.0.0.1"
        )
    _set("CELERIAC_FLOWER_PORT", port)
    settings = _settings()
    refuse_taken_port("CELERIAC_FLOWER_PORT", address, settings.flower_port)
    _become_celery(
        "tasks.flower", "flower", f"--address={address}", f"--port={settings.flower_port}", "--max_tasks=10000"
    )


@main.command()
@json_option
def migrate(as_json: bool) -> None:
    """Bring the database schema up to date.

    Also creates the API key in CELERIAC_BOOTSTRAP_API_KEY, if there is one; one that was disabled stays so. Safe to
    repeat.
    """
    settings = _settings()
    from storage.database import migrate as migrate_database

    migrate_database(settings.database_url, lambda line: click.echo(line, err=True))
    if not as_json:
        click.echo("The schema is up to date.")
    is_valid = _ensure_bootstrap_key(settings)
    if as_json:
        print_json({"schema": "up to date", "bootstrap_key_is_valid": is_valid})
    elif is_valid is not None:
        click.echo(
            "The bootstrap key is in place."
            if is_valid
            else "The bootstrap key is disabled or has expired, and stays so: celeriac keys list"
        )


@main.command()
@json_option
def env(as_json: bool) -> None:
    """Print the servers' URLs as shell variables.

    For Celery's own commands and psql, for instance:

    \b
    eval "$(celeriac env)"
    celery -A tasks.app inspect ping
    psql "$CELERIAC_DATABASE_URL"
    """
    import shlex

    settings = _settings()
    urls = {"CELERIAC_DATABASE_URL": settings.database_url, "CELERIAC_REDIS_URL": settings.redis_url}
    if as_json:
        print_json(urls)
        return
    for name, url in urls.items():
        click.echo(f"export {name}={shlex.quote(url)}")


main.add_command(submit)
main.add_command(watch)
main.add_command(cancel)
main.add_command(jobs)
main.add_command(batch)
main.add_command(dead_letters)
main.add_command(queue)
main.add_command(workers)
main.add_command(top)
main.add_command(bench)
main.add_command(doctor)
main.add_command(models)
main.add_command(engines)
main.add_command(keys)
main.add_command(usage)
main.add_command(completion)
main.add_command(tenants)

# Helpers


def _ensure_bootstrap_key(settings: "Settings") -> bool | None:
    """Whether it can be used; None if there is none."""
    if settings.bootstrap_api_key is None:
        return None
    from celeriac.access_options import transaction, user_here
    from storage.administration import ensure_key

    with transaction(settings) as session:
        return ensure_key(session, settings.bootstrap_api_key, name="bootstrap", actor=user_here())


def _never_fail_to_print() -> None:
    """In a locale other than UTF-8, what it lacks is printed as ?, instead of ending the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _set(name: str, value: object) -> None:
    """Let an option override its setting. Sets the environment variable, so that the override survives an exec."""
    if value is not None:
        os.environ[name] = str(value)


def _name_in_traces(process: str) -> None:
    """For OpenTelemetry, unless the user has given the process another name."""
    os.environ.setdefault("OTEL_SERVICE_NAME", f"celeriac-{process}")


def _settings() -> "Settings":
    from local.lock import settings_here

    return settings_here()


def _become_celery(app: str, *arguments: str) -> NoReturn:
    """Replace this process with Celery's command for `app`, so that signals and exit codes are Celery's own."""
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "celery", "-A", app, *arguments])  # noqa: S606


@contextmanager
def _explained(*kinds: type[Exception]) -> Iterator[None]:
    """Show these errors without a traceback, since the user's input caused them."""
    try:
        yield
    except kinds as exc:
        raise click.ClickException(str(exc)) from exc
