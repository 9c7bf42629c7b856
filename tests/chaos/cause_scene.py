"""The running system that `causes` strikes, and what a cause is. What is done is in cause_acts.py."""

import asyncio
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import httpx

from settings import ROOT
from tests.chaos.plant import Plant, host_and_port
from tests.chaos.proxy import Link
from tests.waiting import wait_until

MODELS = """
[[models]]
id = "fake"
path = "none"
backend = "fake"
max_model_len = 4096
max_num_seqs = 8
[models.fake]
step_seconds = 0.02
crash_at_token = 3
crash_seed = 666
crash_how = "raise"
oom_above_n = 4

[[models]]
id = "unserved"
path = "none"
backend = "fake"
max_model_len = 4096
"""
LINKED = ("api-1", "gpu-1", "maintenance")
WELL_SECONDS = 3.0  # for which nothing may be said before the next cause
Undo = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Cause:
    """`health`, `doctor` and `alert` are patterns of what each must say; None: by design, it says nothing of it.
    `tenant` is what a tenant is told when `as_tenant` asks, of what only it can mend."""

    name: str
    act: Callable[["Scene"], Undo]
    health: str | None
    doctor: str | None
    alert: str | None
    needs_small_disk: bool = False
    tenant: str | None = None
    as_tenant: Callable[["Scene"], str] = lambda scene: ""
    doctor_api: int = 0  # the number of the API that the doctor is told of


class Scene:
    """The running system and the links before it. Those of LINKED reach their servers through links of their own, which
    can be cut; the others reach them directly."""

    def __init__(self, plant: Plant, *, has_small_disk: bool) -> None:
        self.plant = plant
        self.has_small_disk = has_small_disk
        self.links: dict[str, Link] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self.plant.start_servers()
        postgres_socket = Path(self.plant.postgres.url.partition("host=")[2]) / ".s.PGSQL.5432"
        for part in LINKED:
            self._open(f"{part} to postgres", postgres_socket)
            self._open(f"{part} to redis", host_and_port(self.plant.redis.url))
        self.plant.start_parts(database_url=self._database_url, redis_url=self._redis_url)
        self.plant.wait_until_ready()
        self.wait_until_well(60)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def strike(self, cause: Cause) -> Undo:
        return cause.act(self)

    def on_loop(self, act: Callable[[], Any]) -> None:
        """Links belong to their loop."""
        done = threading.Event()

        def run() -> None:
            act()
            done.set()

        self._loop.call_soon_threadsafe(run)
        done.wait()

    def doctor_environment(self) -> dict[str, str]:
        own = {key: value for key, value in os.environ.items() if not key.startswith("CELERIAC_")}
        return own | {
            "CELERIAC_DATABASE_URL": self.plant.postgres.url,
            "CELERIAC_REDIS_URL": self.plant.redis.url,
            "CELERIAC_MODELS_FILE": str(self.plant.folder / "models.toml"),
            "CELERIAC_DATA_DIR": str(self.plant.folder / "data"),
            "PYTHONPATH": str(ROOT),
        }

    def wait_until_well(self, seconds: float) -> None:
        """All parts run, and no API has had anything to say for a while."""
        well_since = float("inf")

        def is_well() -> bool:
            nonlocal well_since
            self.plant.watch()
            if all(map(_has_nothing_to_say, self.plant.api_urls)):
                well_since = min(well_since, time.monotonic())
            else:
                well_since = float("inf")
            return time.monotonic() - well_since > WELL_SECONDS

        wait_until(is_well, "all is well again", seconds=seconds, pause_seconds=0.2)

    def _open(self, name: str, upstream: tuple[str, int] | Path) -> None:
        link = Link(name, upstream)
        asyncio.run_coroutine_threadsafe(link.__aenter__(), self._loop).result()
        self.links[name] = link

    def _database_url(self, name: str) -> str:
        link = self.links.get(f"{name} to postgres")
        if link is None:
            return self.plant.database_url(name)
        options = f"application_name={name}&sslmode=disable&gssencmode=disable"
        return f"postgresql://postgres@127.0.0.1:{link.port}/{self.plant.postgres.database}?{options}"

    def _redis_url(self, name: str) -> str:
        link = self.links.get(f"{name} to redis")
        _, port = host_and_port(self.plant.redis.url)
        return self.plant.redis.url if link is None else self.plant.redis.url.replace(f":{port}/", f":{link.port}/")


def _has_nothing_to_say(url: str) -> bool:
    try:
        return bool(httpx.get(f"{url}/health", timeout=10).json()["status"] == "ok")
    except (httpx.HTTPError, ValueError, KeyError):
        return False
