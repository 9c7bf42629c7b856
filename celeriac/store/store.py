"""The store: one folder per model, complete or absent, with a manifest of hashes and an entry for the catalogue.

A pull writes into a hidden folder beside them, which becomes the model's by one rename when all is there and checked.
"""

import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, Protocol

from pydantic import ValidationError

from celeriac.store.files import (
    ModelRefused,
    RemoteFile,
    choose,
    refuse_broken_weights,
    refuse_description,
)
from celeriac.store.gguf import convert, refuse_without_packages
from celeriac.store.sources import Source, refuse_full_disk
from domain.catalog import ENTRY_FILE, ModelEntry
from domain.jobs import Frozen
from local.lock import FileLock
from text.model_files import POOLING_FILES
from text.models import load_model_view

MANIFEST = "manifest.json"
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
LOCK_LOOK_SECONDS = 0.5
#: What bfloat16 weights take, as a multiple of the GGUF file that they are made from: 16 bits for its 4, and a bit.
CONVERTED_RATIO = 4

Task = Literal["generation", "embedding"]


class StoredFile(Frozen):
    """A file of a model as it was when it was pulled."""

    path: str
    size: int
    sha256: str


class Manifest(Frozen):
    """Where a model came from, and all of its files but the catalogue's entry, which may be edited."""

    name: str
    source: str
    licence: str = ""
    pulled_at: datetime
    converted_from: str = ""  # the GGUF file that its safetensors were made from
    files: list[StoredFile]

    @property
    def num_bytes(self) -> int:
        return sum(file.size for file in self.files)


class Watcher(Protocol):
    """Hears how a pull gets on."""

    def begin(self, what: str, num_bytes: int | None) -> None:
        """A step begins; the one before is done."""
        ...

    def advance(self, num_bytes: int) -> None: ...

    def wait(self, why: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a pull is to bring. Left out: `sha256` that the weights must have, and the task, which the files tell."""

    name: str
    source: Source
    num_bytes: int | None = None
    sha256: str | None = None
    licence: str = ""
    task: Task | None = None


class ModelStore:
    """All models below one folder. Processes may share it: a pull and a remove of one name take turns."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str) -> Path:
        """Raises ModelRefused for what is no name."""
        if not NAME.fullmatch(name):
            raise ModelRefused(
                f"{name!r} is no name for a model; use a-z, 0-9, and . _ - between them, up to 64 characters"
            )
        return self.folder / name

    def manifests(self) -> list[Manifest]:
        """Those of all models that are here, by name."""
        if not self.folder.is_dir():
            return []
        names = sorted(path.parent.name for path in self.folder.glob(f"*/{MANIFEST}"))
        return [self.manifest(name) for name in names if not name.startswith(".")]

    def manifest(self, name: str) -> Manifest:
        """Raises ModelRefused if there is no such model, or its manifest cannot be read."""
        file = self.path(name) / MANIFEST
        try:
            return Manifest.model_validate_json(file.read_bytes())
        except FileNotFoundError:
            here = ", ".join(manifest.name for manifest in self.manifests()) or "none yet"
            raise ModelRefused(f"{name} is not in {self.folder}; there are: {here}") from None
        except (OSError, ValidationError) as exc:
            raise ModelRefused(f"{file} cannot be read; remove the model and pull it again") from exc

    def pull(self, wanted: Wanted, watcher: Watcher) -> Manifest:
        """The manifest of the model, which is here afterwards. One that is here already is left as it is."""
        place = self.path(wanted.name)
        self._make_folder()
        with self._turn(wanted.name, watcher):
            if (place / MANIFEST).is_file():
                return self.manifest(wanted.name)
            refuse_full_disk(self.folder, wanted.num_bytes or 0)
            partial = self.folder / f".{wanted.name}.partial"
            shutil.rmtree(partial, ignore_errors=True)  # of a pull that was killed
            try:
                manifest = self._fetch(wanted, partial, watcher)
                os.replace(partial, place)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        return manifest

    def problems(self, name: str, watcher: Watcher) -> list[str]:
        """What differs from the manifest, in words; empty if nothing does."""
        manifest, place, found = self.manifest(name), self.path(name), []
        watcher.begin(f"Checking {name}", manifest.num_bytes)
        for file in manifest.files:
            path = place / file.path
            if not path.is_file():
                found.append(f"{file.path} is missing")
            elif path.stat().st_size != file.size:
                found.append(f"{file.path} has {path.stat().st_size:,} bytes and not {file.size:,}")
            elif sha256_of(path, watcher.advance) != file.sha256:
                found.append(f"{file.path} has changed: its SHA-256 is not {file.sha256}")
        expected = {file.path for file in manifest.files} | {MANIFEST, ENTRY_FILE}
        others = {path.relative_to(place).as_posix() for path in place.rglob("*") if not path.is_dir()} - expected
        return found + [f"{path} does not belong to it" for path in sorted(others)]

    def remove(self, name: str, watcher: Watcher) -> int:
        """The number of bytes that were freed. A worker that serves the model goes on with what it has loaded."""
        with self._turn(name, watcher):
            num_bytes = self.manifest(name).num_bytes
            leaving = self.folder / f".{name}.removed"
            shutil.rmtree(leaving, ignore_errors=True)
            os.replace(self.path(name), leaving)  # gone at once, not file by file
            shutil.rmtree(leaving)
        return num_bytes

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise ModelRefused(
                f"{self.folder} cannot be made ({exc.strerror}); name another folder in CELERIAC_MODELS_DIR"
            ) from exc

    @contextmanager
    def _turn(self, name: str, watcher: Watcher) -> Iterator[None]:
        """The lock is the kernel's, so a killed pull holds nothing up."""
        if not self.folder.is_dir():
            self.manifest(name)  # says that it is not here
        lock = FileLock(self.folder / f".{name}.lock")
        is_told = False
        while not lock.take():
            if not is_told:
                watcher.wait(f"another command is at work on {name}; waiting for it")
                is_told = True
            time.sleep(LOCK_LOOK_SECONDS)
        try:
            yield
        finally:
            lock.release()

    def _fetch(self, wanted: Wanted, partial: Path, watcher: Watcher) -> Manifest:
        scratch = partial / "scratch"
        scratch.mkdir(parents=True)
        watcher.begin(f"Fetching {wanted.source.name}", wanted.num_bytes)
        files = choose(wanted.source.list_files(scratch, watcher.advance), wanted.source.name)
        num_bytes = sum(file.size for file in files)
        converted_from = next((file.path for file in files if file.path.endswith(".gguf")), "")
        if converted_from:
            refuse_without_packages(converted_from)
        refuse_full_disk(partial, num_bytes * (1 + CONVERTED_RATIO) if converted_from else num_bytes)
        watcher.begin(f"Storing {wanted.name}", num_bytes)
        self._fetch_files(wanted, files, partial, watcher)
        shutil.rmtree(scratch)
        if converted_from:
            watcher.begin(f"Converting {converted_from} to safetensors", None)
            convert(partial / converted_from, partial)
        entry = _entry_of(wanted, partial)
        load_model_view(entry)  # as the API will
        (partial / ENTRY_FILE).write_text(_entry_text(wanted.name, entry.task), encoding="utf-8")
        watcher.begin(f"Hashing {wanted.name}", None)
        manifest = Manifest(
            name=wanted.name,
            source=wanted.source.name,
            licence=wanted.licence,
            pulled_at=datetime.now(UTC),
            converted_from=converted_from,
            files=_stored_files(partial),
        )
        (partial / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
        _sync(partial)
        return manifest

    def _fetch_files(self, wanted: Wanted, files: list[RemoteFile], partial: Path, watcher: Watcher) -> None:
        """Descriptions come first, and what they give away is refused before any weights are fetched."""
        for file in files:
            target = partial / file.path
            target.parent.mkdir(parents=True, exist_ok=True)
            if file.is_weights:
                refuse_description(partial, wanted.source.name)
            wanted.source.fetch(file, target, watcher.advance)
            if target.stat().st_size != file.size:
                raise ModelRefused(
                    f"{file.path} came with {target.stat().st_size:,} bytes, not {file.size:,}; pull it again"
                )
            expected = file.sha256 or (wanted.sha256 if file.is_weights else None)
            if expected is not None and sha256_of(target) != expected:
                raise ModelRefused(
                    f"{file.path} is not what was published: its SHA-256 is not {expected}; pull it again"
                )
            if file.is_weights:
                refuse_broken_weights(target)


def name_of(source: str) -> str:
    """What a model is called if nobody says: the last part of its source without version, suffix and capitals."""
    last = re.sub(r"@[\w.-]+", "", source).rstrip("/").rpartition("/")[2]
    name = re.sub(r"[^a-z0-9._-]+", "-", last.lower().removesuffix(".gguf"))
    return name.strip("._-")[:64]


def sha256_of(file: Path, on_bytes: Callable[[int], None] = lambda _: None) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while part := stream.read(1024 * 1024):
            digest.update(part)
            on_bytes(len(part))
    return digest.hexdigest()


def _stored_files(folder: Path) -> list[StoredFile]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ENTRY_FILE)
    return [
        StoredFile(path=path.relative_to(folder).as_posix(), size=path.stat().st_size, sha256=sha256_of(path))
        for path in files
    ]


def _entry_of(wanted: Wanted, folder: Path) -> ModelEntry:
    is_pooled = any((folder / name).is_file() for name in POOLING_FILES)
    task: Task = wanted.task or ("embedding" if is_pooled else "generation")
    return ModelEntry(id=wanted.name, path=str(folder), task=task)


def _entry_text(name: str, task: Task) -> str:
    lines = [
        "# Written by `celeriac models pull`. Any key of docs/models.md may be added; `models check` allows it.",
        "[[models]]",
        f'id = "{name}"',
        'path = "."',
        *(['task = "embedding"'] if task == "embedding" else []),
    ]
    return "\n".join(lines) + "\n"


def _sync(folder: Path) -> None:
    """The rename must not outlive what it names, if the power goes."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
