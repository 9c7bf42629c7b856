"""Processes of the last release and of this one on the same database and Redis, and a client that watches its jobs."""

import os
import signal
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx
import pytest
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine

from celeriac.client.protocol import parse_events
from gpu_worker.engine.fake_tokens import fake_text
from local.processes import free_port
from settings import ROOT
from storage.database import MIGRATIONS
from storage.database import database_url as normalised
from tests.chaos.plant import Part, Start, start_prepared, start_python
from tests.waiting import wait_until

#: What people who upgrade come from. Until there are tags, a commit; set it anew with each release.
LAST_RELEASE = "426dc0d963b3962edf5368721961616ca46fda6c"
MODEL, SEED, PROMPT_TOKEN_IDS = "fake", 7, [1, 2, 3]
MODELS = f"""
[[models]]
id = "{MODEL}"
path = "none"
backend = "fake"
max_model_len = 4096
max_num_seqs = 16
[models.fake]
step_seconds = 0.02
"""
SETTINGS = {"LOG_FORMAT": "text", "LEASE_SECONDS": "3", "LEASE_GRACE_SECONDS": "0.5", "DRAIN_SECONDS": "0.1"}


@dataclass(frozen=True)
class Release:
    """A source tree, and how its processes are started."""

    name: str
    root: Path
    start: Start


THIS_RELEASE = Release("new", ROOT, start_prepared)


def unpack_last_release(folder: Path) -> Release:
    """Skips the test where the history does not go back that far."""
    git = ["git", "-C", str(ROOT)]
    if subprocess.run([*git, "cat-file", "-e", f"{LAST_RELEASE}^{{commit}}"], capture_output=True).returncode != 0:
        pytest.skip(f"this checkout has no commit {LAST_RELEASE[:10]}, the last release; git fetch --unshallow gets it")
    archive = folder / "last_release.tar"
    subprocess.run([*git, "archive", "--output", str(archive), LAST_RELEASE], check=True)
    root = folder / "last_release"
    with tarfile.open(archive) as packed:
        packed.extractall(root, filter="data")
    return Release("old", root, start_python)


class Schema:
    """The revision at which this release's migrations have put the database. Use it from one thread at a time."""

    def __init__(self, database_url: str) -> None:
        self._database = create_engine(normalised(database_url))
        self._config = Config()
        self._config.set_main_option("script_location", str(MIGRATIONS))
        self._scripts = ScriptDirectory.from_config(self._config)

    def revisions_after(self, revision: str) -> list[str]:
        """In the order in which they are applied."""
        newer = [script.revision for script in self._scripts.iterate_revisions("head", revision)]
        return newer[::-1]

    @property
    def revision(self) -> str:
        with self._database.connect() as connection:
            return str(connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar())

    def upgrade(self, revision: str) -> None:
        with self._database.connect() as connection:
            self._config.attributes["connection"] = connection
            command.upgrade(self._config, revision)
            connection.commit()

    def downgrade(self, revision: str) -> None:
        with self._database.connect() as connection:
            self._config.attributes["connection"] = connection
            command.downgrade(self._config, revision)
            connection.commit()

    def close(self) -> None:
        self._database.dispose()


class Installation:
    """Any number of processes of any release. All end with it."""

    def __init__(self, folder: Path, database_url: str, redis_url: str, **settings: str) -> None:
        self._folder = folder
        self._running: list[Part] = []
        self._number = 0
        models_file = folder / "models.toml"
        models_file.write_text(MODELS)
        own = {
            "DATABASE_URL": database_url,
            "REDIS_URL": redis_url,
            "MODELS_FILE": str(models_file),
            "DATA_DIR": str(folder / "data"),
        }
        others = {name: value for name, value in os.environ.items() if not name.startswith("CELERIAC_")}
        self._environment = others | {f"CELERIAC_{name}": value for name, value in (SETTINGS | own | settings).items()}

    def start(self, release: Release, *arguments: str) -> Part:
        """`celeriac ARGUMENTS`."""
        self._number += 1
        name = f"{self._number}-{release.name}-{arguments[0]}"
        environment = self._environment | {"PYTHONPATH": str(release.root), "OMP_NUM_THREADS": "1"}
        log_path = self._folder / f"{name}.log"
        part = Part(name, ["celeriac", *arguments], environment, log_path, release.root, release.start)
        part.start()
        self._running.append(part)
        return part

    def run(self, release: Release, *arguments: str) -> None:
        """`celeriac ARGUMENTS`, to its end."""
        part = self.start(release, *arguments)
        wait_until(lambda: not part.is_running, f"{part} has ended")
        assert part.newest.process.returncode == 0, part.log()

    def start_api(self, release: Release, *, port: int | None = None) -> "ReleaseApi":
        port = port or free_port("127.0.0.1", 0)
        api = ReleaseApi(self.start(release, "api", "--port", str(port)), port)
        wait_until(lambda: api.is_live or not api.part.is_running, f"{api.part} answers")
        assert api.part.is_running, api.part.log()
        return api

    def start_worker(self, release: Release) -> Part:
        """Returns at once; jobs wait until it takes them."""
        return self.start(release, "worker", "--name", f"gpu-{self._number}", "--model", MODEL)

    def stop(self, part: Part) -> None:
        """As in a rolling upgrade, by SIGTERM."""
        part.send(signal.SIGTERM)
        wait_until(lambda: not part.is_running, f"{part} has ended")
        self._running.remove(part)
        part.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for part in self._running:
            part.close()


class ReleaseApi:
    """An API process, and a client of it."""

    def __init__(self, part: Part, port: int) -> None:
        self.part, self.port = part, port
        self.url = f"http://127.0.0.1:{port}"

    @property
    def is_live(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health/live", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    def submit(self, num_tokens: int) -> str:
        params = {"max_tokens": num_tokens, "seed": SEED, "ignore_eos": True}
        body = {"model": MODEL, "prompt_token_ids": PROMPT_TOKEN_IDS, "params": params}
        response = httpx.post(f"{self.url}/v1/jobs", json=body, timeout=30)
        assert response.status_code == 202, response.text
        return str(response.json()["id"])

    @contextmanager
    def streaming(self, num_tokens: int) -> Iterator[str]:
        """Submit a job and read its stream up to its first text; on leaving, to its end, which must be as expected."""
        job_id = self.submit(num_tokens)
        with httpx.stream("GET", f"{self.url}/v1/jobs/{job_id}/events", timeout=60) as response:
            assert response.status_code == 200, response.read()
            events = parse_events(response.iter_lines())
            text = next(event.text for event in events if event.text)
            yield job_id
            *others, last = events
        assert last.name == "job.completed", last
        assert text + "".join(event.text for event in others) == text_of(num_tokens)
        self.check(job_id, num_tokens)

    def check(self, job_id: str, num_tokens: int) -> None:
        """The job is stored as it should be."""
        response = httpx.get(f"{self.url}/v1/jobs/{job_id}", timeout=30)
        assert response.status_code == 200, response.text
        job = response.json()
        assert (job["status"], job["output"]["text"]) == ("completed", text_of(num_tokens)), job


def text_of(num_tokens: int) -> str:
    return fake_text(PROMPT_TOKEN_IDS, SEED, 0, num_tokens)
