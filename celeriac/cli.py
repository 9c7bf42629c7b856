"""The `celeriac` command. Every command imports what it needs when it runs, so that `--help` answers at once."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from celeriac.checks import (
    api_url,
    read_catalog,
    refuse_shared_sessions,
    refuse_taken_port,
    refuse_unknown_default,
    refuse_unknown_models,
)
from celeriac.engines import engines
from celeriac.keys import keys
from celeriac.models import models

if TYPE_CHECKING:
    from celeriac.client import Client
    from celeriac.client.protocol import Prompt
    from settings import Settings

LOOPBACK_ADDRESSES = ("127.0.0.1", "::1", "localhost")

#: Whether this is a checkout. `pip install celeriac` installs only the client and the commands that use it.
HAS_SERVER = (Path(__file__).parents[1] / "gpu_worker").is_dir()
CLIENT_COMMANDS = frozenset({"submit", "watch", "cancel", "jobs", "batch"})


class Commands(click.Group):
    """Commands in the order in which they are defined."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for name in self.commands if HAS_SERVER or name in CLIENT_COMMANDS]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if not HAS_SERVER and cmd_name in self.commands.keys() - CLIENT_COMMANDS:
            raise click.ClickException(
                f"`celeriac {cmd_name}` needs the server, but only the client is installed here; run it in a checkout"
            )
        return super().get_command(ctx, cmd_name)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.ClickException:
            raise
        except Exception as exc:
            from celeriac.terminal import explain

            if message := explain(exc):
                raise click.ClickException(message) from exc
            raise


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="celeriac")
def main() -> None:
    """Run LLM generation as durable jobs: accepted jobs survive crashes, and broken streams resume where they stopped.

    \b
    celeriac up                                everything on this machine, with a first job
    celeriac submit "What is 17 + 25?"         run a job and watch its text arrive
    celeriac jobs                              list jobs, newest first

    `celeriac up` starts its own PostgreSQL and Redis unless you give the URLs of yours. The other commands use
    CELERIAC_DATABASE_URL and CELERIAC_REDIS_URL if those are set, and otherwise the servers that `celeriac up` started
    in this folder. Every setting is an environment variable; docs/operations.md lists them.
    """


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
    from celeriac.up import Up
    from domain.errors import ModelUnavailable
    from settings import get_settings

    _set("CELERIAC_DEFAULT_MODEL", model)
    settings = get_settings()
    catalog = read_catalog(settings)
    refuse_unknown_default(settings, catalog)
    with _explained(ModelUnavailable):
        _ = catalog.first  # raise now if no model is available, instead of starting a worker that cannot start
    Up(settings, with_first_job=first_job).run()


@main.command()
@click.option("--host", help="Address to listen on.  [default: CELERIAC_HOST or 127.0.0.1]")
@click.option("--port", type=int, help="Port to listen on.  [default: CELERIAC_PORT or 8000]")
def api(host: str | None, port: int | None) -> None:
    """Serve the HTTP API."""
    _set("CELERIAC_HOST", host)
    _set("CELERIAC_PORT", port)
    settings = _settings()
    from api.app import refuse_public_access_without_keys
    from api.server import serve

    with _explained(ValueError):
        refuse_public_access_without_keys(settings)
        read_catalog(settings)
    refuse_shared_sessions(settings)
    refuse_taken_port("CELERIAC_PORT", settings.host, settings.port)
    serve(settings)


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
def migrate() -> None:
    """Bring the database schema up to date.

    Also creates the API key in CELERIAC_BOOTSTRAP_API_KEY, if there is one. Safe to repeat.
    """
    settings = _settings()
    from storage.database import migrate as migrate_database

    migrate_database(settings.database_url, lambda line: click.echo(line, err=True))
    click.echo("The schema is up to date.")
    if settings.bootstrap_api_key is not None:
        from celeriac.keys import transaction
        from storage import tenants
        from storage.tables import DEFAULT_TENANT_ID

        with transaction(settings) as session:
            tenants.ensure_key(session, settings.bootstrap_api_key, DEFAULT_TENANT_ID, name="bootstrap")
        click.echo("The bootstrap key is in place.")


@main.command()
def env() -> None:
    """Print the servers' URLs as shell variables.

    For Celery's own commands and psql, for instance:

    \b
    eval "$(celeriac env)"
    celery -A tasks.app inspect ping
    psql "$CELERIAC_DATABASE_URL"
    """
    import shlex

    settings = _settings()
    click.echo(f"export CELERIAC_DATABASE_URL={shlex.quote(settings.database_url)}")
    click.echo(f"export CELERIAC_REDIS_URL={shlex.quote(settings.redis_url)}")


# Jobs


def connection_options(command: Any) -> Any:
    """--url and --key."""
    command = click.option("--key", help="API key.  [default: CELERIAC_API_KEY]")(command)
    text = "URL of the API.  [default: CELERIAC_API_URL, else that of `celeriac up` in this folder]"
    return click.option("--url", help=text)(command)


@main.command()
@click.argument("prompt")
@click.option("--model", help="Model to use.  [default: the installation's default model]")
@click.option("--max-tokens", type=click.IntRange(1), help="Stop after this many tokens.")
@click.option("--temperature", type=click.FloatRange(0, 2), help="0 always takes the most likely token.")
@click.option("--seed", type=int, help="The same seed, prompt and model give the same text.")
@click.option("--stop", multiple=True, help="Stop before this text; may be given several times.")
@click.option("--system", help="Instructions that come before the prompt.")
@click.option("--complete", is_flag=True, help="Continue the prompt as it stands instead of answering it.")
@click.option("--stream", "mode", flag_value="stream", default="stream", help="Print the text as it arrives (default).")
@click.option("--wait", "mode", flag_value="wait", help="Print the whole text at the end.")
@click.option("--detach", "mode", flag_value="detach", help="Print the job's id and exit.")
@connection_options
def submit(prompt: str, mode: str, url: str | None, key: str | None, **options: Any) -> None:
    """Run PROMPT as a job. A PROMPT of - is read from standard input.

    The text goes to standard output, everything else to standard error.

    \b
    celeriac submit "Tell me a story about a fox."
    celeriac submit --temperature 0 --max-tokens 20 "What is 17 + 25?"
    celeriac submit --wait - < prompt.txt > answer.txt
    id=$(celeriac submit --detach "Hello!"); celeriac watch $id

    The job runs on its own: Ctrl-C or a lost connection ends the output, not the job.
    """
    from celeriac.terminal import follow

    text = sys.stdin.read() if prompt == "-" else prompt
    content = as_prompt(text, system=options.pop("system"), complete=options.pop("complete"))
    given = {name: value for name, value in options.items() if value not in (None, ())}
    with _client(url, key) as client:
        job = client.submit(content, **given)
        if mode == "detach":
            click.echo(job.id)
            return
        sys.exit(follow(client, job.id, is_live=mode == "stream"))


@main.command()
@click.argument("job_id")
@click.option("--after", metavar="N", help="Begin after the event with this number instead of at the start.")
@connection_options
def watch(job_id: str, after: str | None, url: str | None, key: str | None) -> None:
    """Print a job's text so far, and the rest as it arrives.

    \b
    celeriac watch job_01...               from its start
    celeriac watch --after 12 job_01...    after event 12
    """
    from celeriac.terminal import follow

    with _client(url, key) as client:
        sys.exit(follow(client, job_id, is_live=True, starting_after=after))


@main.command()
@click.argument("job_id")
@connection_options
def cancel(job_id: str, url: str | None, key: str | None) -> None:
    """Cancel JOB_ID; the text it has produced is kept."""
    with _client(url, key) as client:
        job = client.cancel(job_id)
    click.echo(f"{job.id}: {job.status}" + (", stops at the next token" if job.status == "in_progress" else ""))


@main.command()
@click.option("--status", type=click.Choice(["queued", "in_progress", "completed", "failed", "cancelled", "expired"]))
@click.option("--model", help="Only jobs of this model.")
@click.option("--limit", type=click.IntRange(1, 100), default=20, show_default=True)
@connection_options
def jobs(status: str | None, model: str | None, limit: int, url: str | None, key: str | None) -> None:
    """List jobs, newest first."""
    from celeriac.terminal import jobs_table, show

    with _client(url, key) as client:
        page = client.jobs(status=status, model=model, limit=limit)
    if not page.jobs:
        click.echo('No jobs yet; run one: celeriac submit "Hello!"' if not status else f"No job is {status}.")
        return
    show(jobs_table(page))


@main.group()
def batch() -> None:
    """Run files of requests. Batches use what is left over by requests that somebody waits for."""


@batch.command(name="run")
@click.argument("requests", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(dir_okay=False, path_type=Path), help="Results go here.")
@click.option("--window", default="24h", show_default=True, help="Time for the whole batch, from 1h to 7d.")
@connection_options
def run_batch(requests: Path, output: Path, window: str, url: str | None, key: str | None) -> None:
    """Run the REQUESTS of a JSONL file, in OpenAI's format, and write the results.

    Ctrl-C ends the waiting, not the batch: `celeriac batch get` fetches its results later.

    \b
    celeriac batch run in.jsonl -o out.jsonl
    """
    from celeriac.terminal import BatchPrinter

    with _client(url, key) as client, BatchPrinter() as printer:
        printer.finish(client.batch(requests, output, completion_window=window, on_progress=printer.show))


@batch.command(name="get")
@click.argument("batch_id")
@click.option("-o", "--output", required=True, type=click.Path(dir_okay=False, path_type=Path), help="Results go here.")
@connection_options
def get_batch(batch_id: str, output: Path, url: str | None, key: str | None) -> None:
    """Wait for a batch and write its results."""
    from celeriac.terminal import BatchPrinter

    with _client(url, key) as client, BatchPrinter() as printer:
        printer.finish(client.batch_results(batch_id, output, on_progress=printer.show))


@main.command()
@connection_options
def workers(url: str | None, key: str | None) -> None:
    """List the live GPU workers, with the models that each serves and how far loads have come.

    If keys are required, this needs an admin key.
    """
    from celeriac.terminal import show, workers_table

    with _client(url, key) as client:
        statuses = client.model_statuses()
    if not any(model["workers"] for model in statuses):
        click.echo("No worker is alive; start one: celeriac worker")
        return
    show(workers_table(statuses))


main.add_command(models)
main.add_command(engines)
main.add_command(keys)

# Helpers


def _set(name: str, value: object) -> None:
    """Let an option override its setting. Sets the environment variable, so that the override survives an exec."""
    if value is not None:
        os.environ[name] = str(value)


def _settings() -> "Settings":
    from local.lock import settings_here

    return settings_here()


def _become_celery(app: str, *arguments: str) -> NoReturn:
    """Replace this process with Celery's command for `app`, so that signals and exit codes are Celery's own."""
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "celery", "-A", app, *arguments])  # noqa: S606


def _client(url: str | None, key: str | None) -> "Client":
    from celeriac.client import Client

    if not HAS_SERVER:
        return Client(url, key)
    from settings import get_settings

    settings = get_settings()
    return Client(url or api_url(settings), key or settings.api_key)


def as_prompt(text: str, *, system: str | None, complete: bool) -> "Prompt":
    """The text itself, to be continued, or a chat that ends with it. Raises ClickException."""
    if not text.strip():
        raise click.ClickException("the prompt is empty; give some text, or - and some text on standard input")
    if complete and system:
        raise click.ClickException(
            "--complete and --system cannot be combined; leave out one, or put both texts into the prompt"
        )
    if complete:
        return text
    messages = [{"role": "system", "content": system}] if system else []
    return [*messages, {"role": "user", "content": text}]


@contextmanager
def _explained(*kinds: type[Exception]) -> Iterator[None]:
    """Show these errors without a traceback, since the user's input caused them."""
    try:
        yield
    except kinds as exc:
        raise click.ClickException(str(exc)) from exc
