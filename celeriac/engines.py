"""`celeriac engines`: separate Python environments for engines."""

import subprocess

import click

from celeriac.options import json_option, print_json


@click.group(invoke_without_command=True)
@json_option
@click.pass_context
def engines(ctx: click.Context, as_json: bool) -> None:
    """List or install engines with their own Python environments."""
    if ctx.invoked_subcommand is not None:
        return
    from local.engine_environments import installed, recipes
    from local.lock import settings_here

    data_dir = settings_here().data_dir
    found = {recipe.backend: installed(recipe, data_dir) for recipe in recipes().values()}
    if as_json:
        versions = {backend: engine and engine.version for backend, engine in found.items()}
        print_json([{"backend": backend, "installed": version} for backend, version in versions.items()])
        return
    for recipe in recipes().values():
        engine = found[recipe.backend]
        state = "not installed" if engine is None else f"{recipe.package} {engine.version}, devices: {engine.devices}"
        click.echo(f"{recipe.backend}: {recipe.title}; {state}")


@engines.command()
@click.argument("name")
def install(name: str) -> None:
    """Create the environment of an engine in the data directory, or recreate it with this release's versions."""
    from local.engine_environments import install as make
    from local.engine_environments import recipes
    from local.lock import settings_here

    recipe = recipes().get(name)
    if recipe is None:
        raise click.ClickException(f"no engine is called {name[:100]!r}; choose one of: {', '.join(recipes())}")
    click.echo(f"Installing {recipe.package} {recipe.version}, some minutes and up to some gigabytes.")
    try:
        python = make(recipe, settings_here().data_dir)
    except subprocess.CalledProcessError as exc:
        raise click.ClickException(
            f"{recipe.backend} could not be installed, see above; an earlier installation is unchanged"
        ) from exc
    click.echo(f'Done: entries with backend = "{recipe.backend}" use {python}.')
