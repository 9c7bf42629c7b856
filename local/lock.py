"""Which `celeriac up` runs on a data folder: the lock that makes it one, and the note that tells others its URLs."""

import fcntl
import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Self

from settings import FOUND, PREFIX, Settings, find_running, get_settings, note_in


class AlreadyUp(Exception):
    """Another `celeriac up` holds the folder."""


class UnusableFolder(Exception):
    """The data folder cannot be made or written to."""


class UpLock:
    """The lock that makes `celeriac up` one per data folder, with a note for other commands: its pid and its URLs.

    The lock is the kernel's (flock), so one that a killed process left behind is free.
    """

    def __init__(self, data_dir: Path) -> None:
        self._path = data_dir / "up.json"
        self._file: IO[str] | None = None

    def take(self) -> Self:
        """Raises AlreadyUp, which names the holder, and UnusableFolder."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            file = open(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600), "r+")  # noqa: SIM115  (held until release)
        except OSError as exc:
            raise UnusableFolder(
                f"CELERIAC_DATA_DIR is {self._path.parent}: {exc.strerror}; give a folder that can be written to"
            ) from exc
        if not _locked(file):
            note = note_in(file)
            file.close()
            raise AlreadyUp(
                f"celeriac up runs here already (pid {note.get('pid', '?')}, {note.get('api_url', 'still starting')}); "
                f"stop it with Ctrl-C in its terminal or with: kill {note.get('pid', '?')}"
            )
        self._file = file
        self.write({"pid": os.getpid()})
        return self

    def write(self, note: dict[str, Any]) -> None:
        assert self._file is not None
        self._file.seek(0)
        self._file.truncate()
        json.dump(note, self._file)
        self._file.flush()

    def release(self) -> None:
        if self._file is not None:
            self._file.truncate(0)
            self._file.close()
        self._file = None


def _locked(file: IO[str]) -> bool:
    """Take the lock. Tries for a moment: `find_running` of another command holds it while it looks."""
    for _ in range(20):
        with suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        time.sleep(0.02)
    return False


def settings_here() -> Settings:
    """The settings, with the servers of the `celeriac up` of this folder where none are named. They go into the
    environment, so that a process we become finds them, too."""
    given = Settings()
    running = find_running(given.data_dir) or {}
    found = [name for name in ("database_url", "redis_url") if name in running and name not in given.model_fields_set]
    for name in found:
        os.environ[PREFIX + name.upper()] = running[name]
    if found:
        os.environ[FOUND] = ",".join(found)
    return get_settings()
