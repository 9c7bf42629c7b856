"""`celeriac maintenance` as a process with a port of its own."""

import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.integration.consumer_harness import ROOT
from tests.prepared import PreparedProcess, nursery
from tests.waiting import SECONDS, wait_until

MODELS = '[[models]]\nid = "test-model"\npath = "none"\nbackend = "fake"\nmax_model_len = 64\n'


@dataclass
class RunningMaintenance:
    process: PreparedProcess
    log_path: Path

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    @property
    def url(self) -> str:
        found = re.search(r"health and metrics on (http://\S+?)\"", self.log)
        assert found, self.log
        return found[1]

    def health(self) -> tuple[int, dict[str, Any]]:
        response = httpx.get(f"{self.url}/health", timeout=SECONDS)
        return response.status_code, response.json()

    def ages(self) -> dict[str, float]:
        ages: dict[str, float] = self.health()[1]["seconds_since_last_tick"]
        return ages

    def wait_until_ready(self) -> None:
        wait_until(lambda: "maintenance is ready" in self.log, "maintenance is ready")

    def terminate(self) -> int:
        self.process.terminate()
        return self.process.wait()

    def send(self, signal_number: signal.Signals) -> None:
        self.process.send_signal(signal_number)


@contextmanager
def maintaining(
    folder: Path,
    database_url: str,
    redis_url: str,
    *,
    program: tuple[str, ...] = ("celeriac",),
    **settings: object,
) -> Iterator[RunningMaintenance]:
    """`settings`: variables without their prefix; `program` is a module in place of the command, with its arguments."""
    models_file = folder / "models.toml"
    models_file.write_text(MODELS)
    environment = os.environ | {
        "CELERIAC_DATABASE_URL": database_url,
        "CELERIAC_REDIS_URL": redis_url,
        "CELERIAC_MODELS_FILE": str(models_file),
        "CELERIAC_JANITOR_INTERVAL_SECONDS": "0.1",
        "PYTHONPATH": str(ROOT),
        **{f"CELERIAC_{name.upper()}": str(value) for name, value in settings.items()},
    }
    log_path = folder / f"maintenance-{len(list(folder.iterdir()))}.log"
    with log_path.open("wb") as log:
        module, *arguments = program
        process = nursery().start(module, [*arguments, "maintenance"], environment=environment, output=log)
    running = RunningMaintenance(process, log_path)
    try:
        yield running
    finally:
        process.kill()
        process.wait()
