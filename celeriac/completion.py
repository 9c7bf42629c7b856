"""`celeriac completion`: prints the script with which a shell completes commands and options."""

import click


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the script with which SHELL completes commands and options.

    \b
    bash    add to ~/.bashrc:   source <(celeriac completion bash)
    zsh     add to ~/.zshrc:    source <(celeriac completion zsh)
    fish    once:               celeriac completion fish > ~/.config/fish/completions/celeriac.fish
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    completer = kind(context.find_root().command, {}, "celeriac", "_CELERIAC_COMPLETE")
    # Not `source()`, which runs bash to tell its version: that of the machine which prints may be another one's.
    click.echo(completer.source_template % completer.source_vars())
