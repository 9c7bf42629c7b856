"""Copies of the source tree: the one a run is about, whatever is edited meanwhile, and mutants of it.

A mutant is the tree with one rule of the protocol taken out of its text. It runs as any tree does, so the code itself
knows nothing of mutants.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from settings import ROOT
from tests.file_index import PACKAGES

FOLDERS = (*PACKAGES, "migrations")
MODELS = "models"


@dataclass(frozen=True, slots=True)
class Edit:
    """In `file`, `old`, which is there exactly once, becomes `new`."""

    file: str
    old: str
    new: str


class MutantOutOfDate(AssertionError):
    """The code that a mutant changes has changed."""


def copy_tree(target: Path, edits: tuple[Edit, ...] = (), *, source: Path = ROOT) -> Path:
    """The source of the system in `target`, without tests and weights."""
    for folder in FOLDERS:
        shutil.copytree(source / folder, target / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in source.glob("*.py"):
        shutil.copy(file, target)
    (target / MODELS).symlink_to(source / MODELS)
    for edit in edits:
        _apply(edit, target)
    return target


def _apply(edit: Edit, root: Path) -> None:
    path = root / edit.file
    text = path.read_text()
    if text.count(edit.old) != 1:
        raise MutantOutOfDate(f"{edit.file} has {text.count(edit.old)} times, not once: {edit.old!r}")
    path.write_text(text.replace(edit.old, edit.new))
