"""The store: one folder per model, complete or absent, with a manifest of hashes and an entry for the catalogue.

A pull writes into a hidden folder next to the models. Once all is there and checked, one rename makes it the model's.
"""

import hashlib
import os
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
from celeriac.store.gguf import convert, describe, refuse_without_packages
from celeriac.store.sources import Source, refuse_full_disk
from domain.catalog import ENTRY_FILE, ModelEntry, Task
from domain.jobs import Frozen
from domain.model_sources import NAME
from local.lock import FileLock
from text.model_files import POOLING_FILES, read_json_file
from text.models import load_model_view

MANIFEST = "manifest.json"
LOCK_LOOK_SECONDS = 0.5
#: Size of converted bfloat16 weights as a multiple of their GGUF file: 16 bits per weight instead of 4 or a bit more.
CONVERTED_RATIO = 4

GgufBackend = Literal["llama_cpp", "transformers"]


class StoredFile(Frozen):
    """A file of a model as it was when it was pulled."""

    path: str
    size: int
    sha256: str


class Manifest(Frozen):
    """Where a model came from, and all of its files except the catalogue entry, which users may edit."""

    name: str
    source: str
    licence: str = ""
    pulled_at: datetime
    converted_from: str = ""  # the GGUF file that its safetensors were made from, if they were
    files: list[StoredFile]

    @property
    def num_bytes(self) -> int:
        return sum(file.size for file in self.files)


class Watcher(Protocol):
    """Is told how a pull progresses."""

    def begin(self, what: str, num_bytes: int | None) -> None:
        """A step begins; the previous one is done."""
        ...

    def advance(self, num_bytes: int) -> None: ...

    def wait(self, why: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to pull. `sha256` is what the weights must have, if known; without a `task`, the model's files decide it.
    `gguf_backend` is what is to run the model if it is a GGUF file; for transformers it is converted."""

    name: str
    source: Source
    num_bytes: int | None = None
    sha256: str | None = None
    licence: str = ""
    task: Task | None = None
    gguf_backend: GgufBackend = "transformers"


class ModelStore:
    """All models in one folder. Processes may share it: pulls and removals of the same name take turns."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str) -> Path:
        """Raises ModelRefused if `name` is not valid."""
        if not NAME.fullmatch(name):
            raise ModelRefused(
                f"{name!r} is not a valid model name; use up to 64 of a-z, 0-9, . _ -, beginning with a letter or digit"
            )
        return self.folder / name

    def manifests(self) -> list[Manifest]:
        """The manifests of all stored models, sorted by name."""
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
            here = ", ".join(manifest.name for manifest in self.manifests()) or "none"
            raise ModelRefused(f"{name} is not in {self.folder}; stored models: {here}") from None
        except (OSError, ValidationError) as exc:
            raise ModelRefused(f"{file} cannot be read; remove the model and pull it again") from exc

    def pull(self, wanted: Wanted, watcher: Watcher) -> Manifest:
        """Store the model and return its manifest. One that is already stored is left unchanged."""
        place = self.path(wanted.name)
        self._make_folder()
        with self._turn(wanted.name, watcher):
            if (place / MANIFEST).is_file():
                return self.manifest(wanted.name)
            refuse_full_disk(self.folder, wanted.num_bytes or 0)
            partial = self.folder / f".{wanted.name}.partial"
            shutil.rmtree(partial, ignore_errors=True)  # left by a pull that was killed
            try:
                manifest = self._fetch(wanted, partial, watcher)
                os.replace(partial, place)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        return manifest

    def problems(self, name: str, watcher: Watcher) -> list[str]:
        """Descriptions of all differences from the manifest."""
        manifest, place, found = self.manifest(name), self.path(name), []
        watcher.begin(f"Checking {name}", manifest.num_bytes)
        for file in manifest.files:
            path = place / file.path
            if not path.is_file():
                found.append(f"{file.path} is missing")
            elif path.stat().st_size != file.size:
                found.append(f"{file.path} has {path.stat().st_size:,} bytes instead of {file.size:,}")
            elif sha256_of(path, watcher.advance) != file.sha256:
                found.append(f"{file.path} has changed: its SHA-256 is not {file.sha256}")
        expected = {file.path for file in manifest.files} | {MANIFEST, ENTRY_FILE}
        others = {path.relative_to(place).as_posix() for path in place.rglob("*") if not path.is_dir()} - expected
        return found + [f"{path} does not belong to the model" for path in sorted(others)]

    def remove(self, name: str, watcher: Watcher) -> int:
        """Delete the model; returns the bytes freed. A worker that serves it continues with what it has loaded."""
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
                f"{self.folder} cannot be created ({exc.strerror}); set CELERIAC_MODELS_DIR to another folder"
            ) from exc

    @contextmanager
    def _turn(self, name: str, watcher: Watcher) -> Iterator[None]:
        """Hold the lock on `name`. The kernel releases it if the process is killed."""
        if not self.folder.is_dir():
            self.manifest(name)  # raises ModelRefused
        lock = FileLock(self.folder / f".{name}.lock")
        is_told = False
        while not lock.take():
            if not is_told:
                watcher.wait(f"another command is working on {name}; waiting for it")
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
        gguf = next((file.path for file in files if file.path.endswith(".gguf")), "")
        converted_from = gguf if wanted.gguf_backend == "transformers" else ""
        if converted_from:
            refuse_without_packages(gguf)
        refuse_full_disk(partial, num_bytes * (1 + CONVERTED_RATIO) if converted_from else num_bytes)
        watcher.begin(f"Storing {wanted.name}", num_bytes)
        self._fetch_files(wanted, files, partial, watcher)
        shutil.rmtree(scratch)
        if converted_from:
            watcher.begin(f"Converting {converted_from} to safetensors", None)
            convert(partial / converted_from, partial)
        elif gguf:
            watcher.begin(f"Reading the description in {gguf}", None)
            describe(partial / gguf, partial)
        entry = _entry_of(wanted, partial, wanted.gguf_backend if gguf else "transformers")
        load_model_view(entry)  # as the API will, which finds broken files now
        (partial / ENTRY_FILE).write_text(_entry_text(entry), encoding="utf-8")
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
        """Weights come last, so that a model can be refused for its configuration before they are fetched."""
        for file in files:
            target = partial / file.path
            target.parent.mkdir(parents=True, exist_ok=True)
            if file.is_weights:
                refuse_description(partial, wanted.source.name)
            wanted.source.fetch(file, target, watcher.advance)
            if target.stat().st_size != file.size:
                raise ModelRefused(
                    f"{file.path} arrived with {target.stat().st_size:,} bytes instead of {file.size:,}; pull it again"
                )
            expected = file.sha256 or (wanted.sha256 if file.is_weights else None)
            if expected is not None and sha256_of(target) != expected:
                raise ModelRefused(
                    f"{file.path} is not what was published: its SHA-256 is not {expected}; pull it again"
                )
            if file.is_weights:
                refuse_broken_weights(target)


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


def _entry_of(wanted: Wanted, folder: Path, backend: GgufBackend) -> ModelEntry:
    is_pooled = any((folder / name).is_file() for name in POOLING_FILES)
    architectures = read_json_file(folder / "config.json").get("architectures") or [""]
    is_scorer = str(architectures[0]).endswith("ForSequenceClassification")
    task: Task = wanted.task or ("scoring" if is_scorer else "embedding" if is_pooled else "generation")
    return ModelEntry(id=wanted.name, path=str(folder), task=task, backend=backend)


def _entry_text(entry: ModelEntry) -> str:
    lines = [
        "# Written by `celeriac models pull`. You may add any key of docs/models.md; `models check` ignores this file.",
        "[[models]]",
        f'id = "{entry.id}"',
        'path = "."',
        *(['backend = "llama_cpp"'] if entry.backend == "llama_cpp" else []),
        *([f'task = "{entry.task}"'] if entry.task != "generation" else []),
    ]
    return "\n".join(lines) + "\n"


def _sync(folder: Path) -> None:
    """Flush all files to disk, so that after a power failure a renamed folder is complete."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
