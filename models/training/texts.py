"""Reads the wordings of the corpus from `texts/`: sections that start with [name], and comments that start with #."""

from functools import cache
from pathlib import Path

_DIRECTORY = Path(__file__).parent / "texts"


@cache
def sections(name: str) -> dict[str, list[str]]:
    """All sections of one file, in order, each with its lines; blank lines are kept as empty strings."""
    lines_by_section: dict[str, list[str]] = {}
    for line in (_DIRECTORY / f"{name}.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            current = lines_by_section.setdefault(line.strip("[]"), [])
        elif lines_by_section and not line.startswith("#"):
            current.append(line)
    return lines_by_section


def lines(name: str, section: str) -> list[str]:
    return [line for line in sections(name)[section] if line]


def words(name: str, section: str) -> list[str]:
    return " ".join(sections(name)[section]).split()


def pairs(name: str, section: str) -> dict[str, str]:
    """Lines of the form `key: value`."""
    return dict(line.split(": ", 1) for line in lines(name, section))


def blocks(name: str, section: str) -> list[list[str]]:
    """The lines of a section in groups divided by blank lines."""
    groups = "\n".join(sections(name)[section]).strip().split("\n\n")
    return [group.split("\n") for group in groups]
