"""The lock that allows one `celeriac up` per data folder; a note in it gives other commands its URLs."""

import fcntl
import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Self

from domain.errors import ExpectedError
from settings import FOUND, PREFIX, Settings, find_running, get_settings, note_in


class AlreadyUp(ExpectedError):
    """Another `celeriac up` is using the folder."""


class UnusableFolder(ExpectedError):
    """The data folder cannot be created or written to."""


class FileLock:
    """A lock on a file. The kernel keeps it (flock), so it is released when its holder ends, however that happens."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: IO[str] | None = None

    def take(self) -> bool:
        """Try to take the lock; False if another process holds it. Retries for a moment, since other commands hold it
        briefly in `find_running`."""
        if self.file is not None:
            return True
        file = open(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600), "r+")  # noqa: SIM115  (held until release)
        for _ in range(20):
            with suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self.file = file
                return True
            time.sleep(0.02)
        file.close()
        return False

    def release(self) -> None:
        if self.file is not None:
            fcntl.flock(self.file, fcntl.LOCK_UN)  # a child that another thread is forking may hold it, too
            self.file.close()
        self.file = None


class UpLock:
    """Allows one `celeriac up` per data folder. The file holds a note for other commands: its pid and URLs."""

    def __init__(self, data_dir: Path) -> None:
        self._lock = FileLock(data_dir / "up.json")

    def take(self) -> Self:
        """Raises AlreadyUp, which names the holder, and UnusableFolder."""
        path = self._lock.path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            is_ours = self._lock.take()
        except OSError as exc:
            raise UnusableFolder(
                f"CELERIAC_DATA_DIR is {path.parent}: {exc.strerror}; give a folder that can be written to"
            ) from exc
        if not is_ours:
            with path.open() as file:
                note = note_in(file)
            raise AlreadyUp(
                f"celeriac up is already running here (pid {note.get('pid', '?')}, "
                f"{note.get('api_url', 'still starting')}); "
                f"stop it with Ctrl-C in its terminal or with: kill {note.get('pid', '?')}. "
                "Another model beside its own needs a worker only: celeriac worker --model NAME"
            )
        self.write({"pid": os.getpid()})
        return self

    def write(self, note: dict[str, Any]) -> None:
        file = self._lock.file
        assert file is not None
        file.seek(0)
        file.truncate()
        json.dump(note, file)
        file.flush()

    def release(self) -> None:
        if self._lock.file is not None:
            self._lock.file.truncate(0)
        self._lock.release()


def settings_here() -> Settings:
    """The settings. Servers and a default model that are not set are those of the `celeriac up` in this folder. They go
    into the environment, so that they survive an exec."""
    given = Settings()
    running = find_running(given.data_dir) or {}
    found = [name for name in ("database_url", "redis_url") if name in running and name not in given.model_fields_set]
    for name in found:
        os.environ[PREFIX + name.upper()] = running[name]
    if running.get("default_model") and "default_model" not in given.model_fields_set:
        os.environ[f"{PREFIX}DEFAULT_MODEL"] = running["default_model"]
    if found:
        os.environ[FOUND] = ",".join(found)
    return get_settings()
