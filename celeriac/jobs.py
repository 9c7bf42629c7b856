"""`celeriac submit`, `watch`, `cancel`, `jobs` and `batch`. Each command imports what it needs when it runs."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from celeriac.options import SECONDS, connection_options, json_option, open_client, print_json

if TYPE_CHECKING:
    from celeriac.client import BatchSnapshot, Client
    from celeriac.client.protocol import Prompt
    from celeriac.terminal import BatchPrinter


@click.command()
@click.argument("prompt")
@click.option("--model", help="Model to use.  [default: the installation's default model]")
@click.option("--max-tokens", type=click.IntRange(1), help="Stop after this many tokens.")
@click.option("--temperature", type=click.FloatRange(0, 2), help="0 always takes the most likely token.")
@click.option("--seed", type=int, help="The same seed, prompt and model give the same text.")
@click.option("--stop", multiple=True, help="Stop before this text; may be given several times.")
@click.option("--deadline", metavar="TIME", help="Expire at this time, such as 2030-01-31T12:00:00Z.")
@click.option("--start-timeout", type=SECONDS, metavar="SECONDS", help="Expire if not started within this time.")
@click.option("--run-timeout", type=SECONDS, metavar="SECONDS", help="Expire after running for this time.")
@click.option("--system", help="Instructions that come before the prompt.")
@click.option("--complete", is_flag=True, help="Continue the prompt as it stands instead of answering it.")
@click.option("--stream", "mode", flag_value="stream", default="stream", help="Print the text as it arrives (default).")
@click.option("--wait", "mode", flag_value="wait", help="Print the whole text at the end.")
@click.option("--detach", "mode", flag_value="detach", help="Print the job's id and exit.")
@connection_options
@json_option
def submit(prompt: str, mode: str, url: str | None, key: str | None, as_json: bool, **options: Any) -> None:
    """Run PROMPT as a job. A PROMPT of - is read from standard input.

    The text goes to standard output, everything else to standard error.

    \b
    celeriac submit "Tell me a story about a fox."
    celeriac submit --temperature 0 --max-tokens 20 "What is 17 + 25?"
    celeriac submit --wait - < prompt.txt > answer.txt
    id=$(celeriac submit --detach "Hello!"); celeriac watch $id

    The job runs on its own: Ctrl-C or a lost connection ends the output, not the job. The exit code is 0 only for a
    completed job. With --json, each event is a line; with --wait or --detach, the job is.
    """
    text = as_utf8(_standard_input() if prompt == "-" else prompt)
    content = as_prompt(text, system=options.pop("system"), complete=options.pop("complete"))
    given = {name: value for name, value in options.items() if value not in (None, ())}
    with open_client(url, key) as client:
        job = client.submit(content, **given)
        if mode == "detach":
            print_json(job.raw) if as_json else click.echo(job.id)
        elif as_json:
            sys.exit(_print_events(client, job.id) if mode == "stream" else _print_end(client, job.id))
        else:
            from celeriac.terminal import follow

            sys.exit(follow(client, job.id, is_live=mode == "stream"))


@click.command()
@click.argument("job_id")
@click.option("--after", metavar="N", help="Begin after the event with this number instead of at the start.")
@connection_options
@json_option
def watch(job_id: str, after: str | None, url: str | None, key: str | None, as_json: bool) -> None:
    """Print a job's text so far, and the rest as it arrives.

    \b
    celeriac watch job_01...               from its start
    celeriac watch --after 12 job_01...    after event 12

    The exit code is 0 only for a completed job. With --json, each event is a line.
    """
    from celeriac.terminal import follow

    with open_client(url, key) as client:
        if as_json:
            sys.exit(_print_events(client, job_id, after))
        sys.exit(follow(client, job_id, is_live=True, starting_after=after))


@click.command()
@click.argument("job_id")
@connection_options
@json_option
def cancel(job_id: str, url: str | None, key: str | None, as_json: bool) -> None:
    """Cancel JOB_ID; the text it has produced is kept."""
    with open_client(url, key) as client:
        job = client.cancel(job_id)
    if as_json:
        print_json(job.raw)
        return
    click.echo(f"{job.id}: {job.status}" + (", stops at the next token" if job.status == "in_progress" else ""))


@click.command()
@click.option("--status", type=click.Choice(["queued", "in_progress", "completed", "failed", "cancelled", "expired"]))
@click.option("--model", help="Only jobs of this model.")
@click.option("--limit", type=click.IntRange(1, 100), default=20, show_default=True)
@connection_options
@json_option
def jobs(status: str | None, model: str | None, limit: int, url: str | None, key: str | None, as_json: bool) -> None:
    """List jobs, newest first."""
    from celeriac.tables import jobs_table, show

    with open_client(url, key) as client:
        page = client.jobs(status=status, model=model, limit=limit)
    if as_json:
        print_json([job.raw for job in page])
        return
    if not page.jobs:
        none = 'No jobs yet; run one: celeriac submit "Hello!"'
        if status or model:
            none = f"No job{f' of {model}' if model else ''} is {status or 'here'}."
        click.echo(none, err=True)
        return
    show(jobs_table(page))


@click.group()
def batch() -> None:
    """Run files of requests. Batches use what is left over by requests that somebody waits for."""


def _refuse_place(_ctx: click.Context, _param: click.Parameter, path: Path) -> Path:
    """Before a batch is sent, and not when its results are there. Raises click.BadParameter."""
    place = path.parent
    if not place.is_dir():
        raise click.BadParameter(f"there is no folder {str(place)!r}; create it, or give another path")
    if not os.access(path if path.exists() else place, os.W_OK):
        raise click.BadParameter(f"{str(path)!r} cannot be written; give another path")
    return path


output_option = click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    callback=_refuse_place,
    help="Results go here.",
)


@batch.command(name="run")
@click.argument("requests", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@output_option
@click.option("--window", default="24h", show_default=True, help="Time for the whole batch, from 1h to 7d.")
@click.option("--start-timeout", type=SECONDS, metavar="SECONDS", help="How long a line may wait, once it is a job.")
@click.option("--run-timeout", type=SECONDS, metavar="SECONDS", help="How long a line may run.")
@connection_options
@json_option
def run_batch(
    requests: Path, output: Path, window: str, url: str | None, key: str | None, as_json: bool, **timeouts: float | None
) -> None:
    """Run the REQUESTS of a JSONL file, in OpenAI's format, and write the results.

    Ctrl-C ends the waiting, not the batch: `celeriac batch get` waits again and fetches its results. The exit code is 0
    only if every line was completed. With --json, the batch is printed at its end.

    \b
    celeriac batch run in.jsonl -o out.jsonl
    """
    from celeriac.terminal import BatchPrinter

    with open_client(url, key) as client, BatchPrinter() as printer:
        done = client.batch(requests, output, completion_window=window, on_progress=printer.show, **timeouts)
        _finish(printer, done, as_json=as_json)


@batch.command(name="get")
@click.argument("batch_id")
@output_option
@connection_options
@json_option
def get_batch(batch_id: str, output: Path, url: str | None, key: str | None, as_json: bool) -> None:
    """Wait for a batch and write its results. The exit code is 0 only if every line was completed."""
    from celeriac.terminal import BatchPrinter

    with open_client(url, key) as client, BatchPrinter() as printer:
        done = client.batch_results(batch_id, output, on_progress=printer.show)
        _finish(printer, done, as_json=as_json)


def _standard_input() -> str:
    """As UTF-8 in every locale; bytes that are none of it become what `as_utf8` refuses."""
    return sys.stdin.buffer.read().decode("utf-8", "surrogateescape").replace("\r\n", "\n")


def as_utf8(text: str) -> str:
    """What was read in another locale, as the UTF-8 that it is. Raises ClickException."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeDecodeError as exc:
        remedy = "convert it, for instance with iconv -f latin1 -t utf-8"
        raise click.ClickException(f"the prompt is not UTF-8 ({exc.reason} at byte {exc.start}); {remedy}") from exc


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


def _print_events(client: "Client", job_id: str, starting_after: str | None = None) -> int:
    """Each event as a line of JSON, as it arrives. Returns the exit code."""
    name = ""
    for event in client.stream(job_id, starting_after=starting_after):
        name = event.name
        print_json({"event": name, "id": event.id, "data": event.data})
    return 0 if name == "job.completed" else 1


def _print_end(client: "Client", job_id: str) -> int:
    """The job as it ended. Returns the exit code."""
    job = client.wait(job_id)
    print_json(job.raw)
    return 0 if job.status == "completed" else 1


def _finish(printer: "BatchPrinter", done: "BatchSnapshot", *, as_json: bool) -> None:
    if as_json:
        print_json(done.raw)
    printer.finish(done)
