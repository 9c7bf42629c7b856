"""`celeriac engines`: separate Python environments for engines."""

import subprocess

import click


@click.group(invoke_without_command=True)
@click.pass_context
def engines(ctx: click.Context) -> None:
    """List or install engines with their own Python environments."""
    if ctx.invoked_subcommand is not None:
        return
    from local.engine_environments import installed, recipes
    from local.lock import settings_here

    data_dir = settings_here().data_dir
    for recipe in recipes().values():
        found = installed(recipe, data_dir)
        state = "not installed" if found is None else f"{recipe.package} {found.version}, devices: {found.devices}"
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
