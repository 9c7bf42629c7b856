"""Every `celeriac` command line of the documents is one that the command accepts, and every entry of models.toml is."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from celeriac import cli
from domain.catalog import Catalog
from tests.documents import DOCUMENTS, FENCE, Snippet, snippets

LINE = re.compile(r"^(?:    |\$ |    \$ )?(?:\w+=\S+ )*(?:\.venv/bin/)?celeriac (.+)$", re.MULTILINE)
SHELL = {"", "sh", "bash", "console"}


def command_lines(document: Path) -> Iterator[str]:
    """What follows `celeriac` in blocks of code, fenced or indented."""
    text = document.read_text()
    for language, block in FENCE.findall(text):
        if language in SHELL:
            yield from LINE.findall(block.replace("\\\n", " "))
    for block in re.findall(r"(?:^    .*\n)+", FENCE.sub("", text), re.MULTILINE):
        yield from LINE.findall(block.replace("\\\n", " "))


def words_of(line: str) -> list[str]:
    """Up to a comment, a pipe or a redirection. `<id>` stands for a word."""
    lexer = shlex.shlex(re.sub(r"<(\w+)>", r"\1", line), posix=True, punctuation_chars="|;&<>")
    lexer.whitespace_split = True
    words = []
    for word in lexer:
        if set(word) <= set("|;&<>"):
            break
        words.append(word)
    return words


def refuse(line: str) -> None:
    """Raises click.UsageError if the line names an unknown command or option, or lacks an argument or has too many."""
    command: click.Command = cli.main
    words, context = words_of(line), click.Context(cli.main, info_name="celeriac")
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        name = words.pop(0)
        found = command.get_command(context, name)
        if found is None:
            raise click.UsageError(f"there is no command {name!r}")
        command, context = found, click.Context(found, info_name=name, parent=context)
    given, rest, _ = command.make_parser(context).parse_args(args=words)
    required = [param.name for param in command.params if isinstance(param, click.Argument) and param.required]
    missing = [name for name in required if not isinstance(given.get(name or ""), str | tuple)]
    if rest or missing:
        raise click.UsageError(f"too much: {rest}; missing: {missing}")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_line_is_accepted(document: Path) -> None:
    for line in command_lines(document):
        try:
            refuse(line)
        except click.UsageError as exc:
            pytest.fail(f"{document.name}: celeriac {line}: {exc.format_message()}")


def test_an_unknown_command_option_or_argument_would_be_found() -> None:
    for line in ("tenants erasse x", "tenants erase x --metdata a=b", "tenants erase", "keys disable a b"):
        with pytest.raises(click.UsageError):
            refuse(line)
    refuse('submit "hello | there" --stream | cat')


def test_the_documents_have_command_lines() -> None:
    assert sum(len(list(command_lines(document))) for document in DOCUMENTS) > 30


@pytest.mark.parametrize("snippet", snippets("toml"), ids=lambda snippet: snippet.text.split("\n")[1])
def test_every_entry_of_models_is_taken(snippet: Snippet, tmp_path: Path) -> None:
    (tmp_path / "models.toml").write_text(snippet.text)
    catalog = Catalog.load(tmp_path / "models.toml")
    assert (len(list(catalog)), dict(catalog.unavailable)) == (1, {})
