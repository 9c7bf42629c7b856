"""`celeriac bench`: a load test of a running server, as its users would see it."""

import json
import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from celeriac.options import SECONDS, connection_options, json_option, print_json

if TYPE_CHECKING:
    from celeriac.load import LoadTest, Target

INTERRUPTED = 130
DEFAULT_JOBS = 100

SYLLABLES = ("ba", "ce", "di", "fo", "gu", "la", "me", "ni", "po", "ru", "sa", "te", "vi", "zo")


@click.command()
@click.option("--model", help="Model to use.  [default: the installation's default model]")
@click.option(
    "-c", "--concurrency", type=click.IntRange(1, 10_000), default=8, show_default=True, help="Requests at any time."
)
@click.option("-n", "--jobs", "num_jobs", type=click.IntRange(1), help=f"How many to send.  [default: {DEFAULT_JOBS}]")
@click.option("--duration", type=SECONDS, metavar="SECONDS", help="Send for this long instead; what runs then ends.")
@click.option(
    "--prompt-words",
    type=click.IntRange(1, 1_000_000),
    multiple=True,
    metavar="N",
    help="Prompts of this many random words; given several times, the lengths take turns.  [default: 100]",
)
@click.option(
    "--prompts",
    type=click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path),
    metavar="FILE",
    help="Requests from this JSONL file instead, again from its start when it ends.",
)
@click.option("--max-tokens", type=click.IntRange(1), help="Length of an answer at most.  [default: 128]")
@click.option("--ignore-eos", is_flag=True, help="Let every answer go on to --max-tokens, so that runs are alike.")
@click.option("--stream/--poll", "is_streaming", default=True, help="Follow the answers, or ask for whole ones.")
@click.option("--openai", "is_openai", is_flag=True, help="Send to /v1/chat/completions, of any server.")
@connection_options
@json_option
def bench(url: str | None, key: str | None, as_json: bool, is_openai: bool, **options: Any) -> None:
    """Put load on a running server, and tell how it did.

    One request is sent first and not counted, so that a wrong key or model is told at once; its words are random. Then
    --concurrency requests are under way at any time. This is a closed loop: a server that stalls is asked less
    meanwhile, so its p99 looks better than users would find it. Random prompts all differ, so that no cache makes the
    figures too good. A refusal (429, 503) is counted by its code, and its place rests as long as the server asks, for
    at most five seconds.

    \b
    celeriac bench                                          100 jobs, 8 at once
    celeriac bench -c 64 --duration 60 --max-tokens 256     64 at once, for a minute
    celeriac bench --prompt-words 50 --prompt-words 2000    short and long prompts by turns
    celeriac bench --prompts mine.jsonl                     your own
    celeriac bench --openai --url http://127.0.0.1:8080 --model m    another server

    A line of --prompts is a text, an object with "prompt" or "messages" and parameters such as "max_tokens", or a line
    of a batch. Times are those of completed jobs: the wait in the queue by the server's clock, and the others by this
    one's. "per token" is a job's average after its first token; "between pieces" shows stalls, since a piece of text
    may be several tokens. With --poll, the server tells when the first token was there.

    With both --openai and --url, the key is that of --key, or else OPENAI_API_KEY: CELERIAC_API_KEY stays here.

    Ctrl-C cancels the jobs that run and shows the figures so far. The exit code is 0 only if jobs were completed and
    none failed; refusals do not count as failures, and all other errors do.
    """
    import asyncio

    shared = {"model": options["model"], "max_tokens": options["max_tokens"] or 128}
    shared |= {"ignore_eos": True} if options["ignore_eos"] else {}
    if options["num_jobs"] and options["duration"]:
        raise click.UsageError("--jobs and --duration both say when to end; give one of them")
    if options["prompts"] and options["prompt_words"]:
        raise click.UsageError("--prompts and --prompt-words both say what to send; give one of them")
    requests = requests_of(options["prompts"], options["prompt_words"] or (100,), shared, is_openai=is_openai)
    plan = {name: options[name] for name in ("concurrency", "num_jobs", "is_streaming")}
    plan["seconds"] = options["duration"]
    if plan["seconds"] is None:
        plan["num_jobs"] = plan["num_jobs"] or DEFAULT_JOBS
    sys.exit(asyncio.run(_run(url, key, requests, plan, is_openai=is_openai, as_json=as_json)))


def requests_of(
    prompts: Path | None, lengths: Sequence[int], shared: Mapping[str, Any], *, is_openai: bool
) -> Iterator[dict[str, Any]]:
    """Without end. What a line of the file says comes before what is `shared`. Raises ClickException."""
    given = {name: value for name, value in shared.items() if value is not None}
    if prompts is None:
        return ({"messages": _message(random_text(length)), **given} for length in cycle(lengths))
    lines = _lines_of(prompts)
    found = [given | _request(line, number) for number, line in enumerate(lines, start=1) if line.strip()]
    if not found:
        raise click.ClickException(f"{prompts} has no requests; each line is a text or an object, in JSON")
    if is_openai:
        found = [_as_chat(request) for request in found]
    return cycle(found)


def trial_of(request: Mapping[str, Any]) -> dict[str, Any]:
    """The same request in other words, so that the server has not seen the real one when it is measured."""
    trial = dict(request)
    if isinstance(trial.get("prompt"), str):
        trial["prompt"] = _other_words(trial["prompt"])
    if isinstance(trial.get("messages"), list):
        trial["messages"] = [_in_other_words(message) for message in trial["messages"]]
    return trial


def _in_other_words(message: Any) -> Any:
    if not isinstance(message, dict) or not isinstance(message.get("content"), str):
        return message
    return message | {"content": _other_words(message["content"])}


def _other_words(text: str) -> str:
    return random_text(max(1, len(text.split())))


def random_text(num_words: int) -> str:
    return " ".join("".join(random.choices(SYLLABLES, k=2)) for _ in range(num_words))


def _lines_of(path: Path) -> list[str]:
    content = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    try:
        return content.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as exc:
        raise click.ClickException(f"{path} is not UTF-8: {exc.reason} at byte {exc.start}; convert it first") from exc


def _request(line: str, number: int) -> dict[str, Any]:
    remedy = 'give a text, {"prompt": …}, {"messages": […]} or a line of a batch, as JSON'
    try:
        said = json.loads(line)
    except ValueError as exc:
        raise click.ClickException(f"line {number} of --prompts is no JSON ({exc}); {remedy}") from exc
    if isinstance(said, str) and said.strip():
        return {"messages": _message(said)}
    if isinstance(said, dict) and isinstance(said.get("body"), dict):
        said = said["body"]
    if not isinstance(said, dict) or not said.keys() & {"prompt", "messages"}:
        raise click.ClickException(f"line {number} of --prompts is no request; {remedy}")
    return {name: value for name, value in said.items() if name not in ("stream", "stream_options")}


def _as_chat(request: Mapping[str, Any]) -> dict[str, Any]:
    if "messages" in request:
        return dict(request)
    others = {name: value for name, value in request.items() if name != "prompt"}
    return {"messages": _message(request["prompt"]), **others}


def _message(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


async def _run(
    url: str | None,
    key: str | None,
    requests: Iterator[dict[str, Any]],
    plan: dict[str, Any],
    *,
    is_openai: bool,
    as_json: bool,
) -> int:
    """Returns the exit code."""
    from celeriac.figures import drawn
    from celeriac.load import LoadTest
    from celeriac.terminal import LoadPrinter, plain_console

    is_streaming = plan.pop("is_streaming")
    where, server = _target(url, key, is_streaming=is_streaming, is_openai=is_openai)
    notes = plain_console(stderr=True)
    first = next(requests)
    requests = chain([first], requests)
    try:
        if not await _try_out(server, trial_of(first), lambda note: notes.print(note, style="dim", markup=False)):
            return INTERRUPTED
        with LoadPrinter(notes, num_jobs=plan["num_jobs"], seconds=plan["seconds"]) as printer:
            load = LoadTest(server, requests, on_change=printer.show, **plan)
            await load.run()
        figures = load.attempts.summary(load.seconds)
    finally:
        await server.close()
    facts = {"url": where, "protocol": "openai" if is_openai else "jobs", "streaming": is_streaming}
    facts |= {"concurrency": plan["concurrency"], "interrupted": load.was_interrupted}
    if as_json:
        print_json(facts | figures)
    else:
        kind = "streams" if is_streaming else "whole answers"
        out = plain_console()
        out.print(f"{where}: {plan['concurrency']} at once, {kind}, {figures['seconds']:.1f} s", markup=False)
        out.print(drawn(figures))
    return _exit_code(load, server, notes.print)


def _target(url: str | None, key: str | None, *, is_streaming: bool, is_openai: bool) -> "tuple[str, Target]":
    from celeriac.load import Celeriac, OpenAiServer
    from celeriac.options import connection

    where, found_key = connection(url, key)
    if not is_openai:
        return where, Celeriac(where, found_key, is_streaming=is_streaming)
    # Another server must not learn the key of this installation.
    key = key or os.environ.get("OPENAI_API_KEY") if url else found_key or os.environ.get("CELERIAC_API_KEY")
    return where, OpenAiServer(where, key, is_streaming=is_streaming)


async def _try_out(server: "Target", request: Mapping[str, Any], on_note: Callable[[str], None]) -> bool:
    """Send one request, so that what is wrong with all of them is said once. False if it was interrupted. Raises
    ClientError if it is refused, and ClickException if its job fails."""
    import asyncio

    from celeriac.figures import Attempt
    from celeriac.load import leave

    attempt = Attempt()
    try:
        await server.run(request, attempt, on_note)
    except asyncio.CancelledError:
        await leave(server)
        on_note(f"interrupted: {server.goodbye()}")
        return False
    except Exception:
        await leave(server)
        raise
    if attempt.outcome != "completed":
        raise click.ClickException(f"the first job {attempt.outcome}: {attempt.code}; nothing was measured")
    on_note(f"the first job took {attempt.took:.2f} s, for {attempt.completion_tokens} tokens; it is not counted")
    return True


def _exit_code(load: "LoadTest", server: "Target", say: Callable[[str], None]) -> int:
    if load.was_interrupted:
        say(f"interrupted: {server.goodbye()}")
        return INTERRUPTED
    outcomes = load.attempts.outcomes.keys()
    return 0 if "completed" in outcomes and outcomes <= {"completed", "refused"} else 1
