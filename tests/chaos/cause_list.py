"""The causes that `causes` brings about: what is done, how it is undone, and by which words each witness names it."""

import asyncio
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import httpx
import psycopg

from local.servers import EmbeddedServer
from settings import ROOT
from tests.chaos.plant import Part, Plant, host_and_port, send_to, start_python
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
"""
WELL_SECONDS = 3.0  # for which nothing may be said before the next cause
NUM_ENGINE_KILLS, ENGINE_SECONDS = 3, 6.0
Undo = Callable[[], None]

# A library that shifts the wall clock of the process that loads it, as of a machine without NTP.
CLOCK_SHIM = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <time.h>
int clock_gettime(clockid_t which, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(which, now);
    if (which == CLOCK_REALTIME) now->tv_sec += 90;
    return result;
}
"""


@dataclass(frozen=True, slots=True)
class Cause:
    """`health`, `doctor` and `alert` are patterns of what each must say; None: by design, it says nothing of it."""

    name: str
    act: Callable[["Scene"], Undo]
    health: str | None
    doctor: str | None
    alert: str | None
    needs_small_disk: bool = False
    doctor_api: int = 0  # the number of the API that the doctor is told of


class Scene:
    """The running system and the links before it. `api-1` and `gpu-1` reach their servers through links of their own,
    which can be cut; the others reach them directly."""

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
        for part in ("api-1", "gpu-1"):
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


# What is done


def stop_server(which: str) -> Callable[[Scene], Undo]:
    def act(scene: Scene) -> Undo:
        server: EmbeddedServer = getattr(scene.plant, which)
        assert server.pid is not None
        send_to([server.pid], signal.SIGQUIT if which == "postgres" else signal.SIGKILL)
        server.stop()
        return lambda: _ignore(server.start())

    return act


def freeze_server(which: str) -> Callable[[Scene], Undo]:
    def act(scene: Scene) -> Undo:
        pids = scene.plant.pids_of(getattr(scene.plant, which))
        send_to(pids, signal.SIGSTOP)
        return lambda: send_to(pids, signal.SIGCONT)

    return act


def fill_disk(scene: Scene) -> Undo:
    """Leaves the log of transactions what it has, as it is written over: tables cannot grow."""
    filler = scene.plant.folder / "postgres" / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"\0" * 65536)
    with filler.open("ab", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"\0" * 512)
    return filler.unlink


def lock_table(name: str) -> Callable[[Scene], Undo]:
    def act(scene: Scene) -> Undo:
        connection = psycopg.connect(f"{scene.plant.postgres.url}&application_name=somebody")
        connection.execute(f"LOCK TABLE {name} IN ACCESS EXCLUSIVE MODE")
        return connection.close

    return act


def use_up_connections(scene: Scene) -> Undo:
    connections = []
    with suppress(psycopg.OperationalError):
        while True:
            connections.append(scene.plant.connect())

    def undo() -> None:
        for connection in connections:
            connection.close()

    return undo


def configure_redis(name: str, value: str, usual: str) -> Callable[[Scene], Undo]:
    def act(scene: Scene) -> Undo:
        client = scene.plant.redis_client()
        client.config_set(name, value)
        return lambda: _ignore(client.config_set(name, usual))

    return act


def cut(link: str) -> Callable[[Scene], Undo]:
    """Everything sent there vanishes, and nobody is told."""

    def act(scene: Scene) -> Undo:
        scene.on_loop(scene.links[link].break_off)
        return lambda: scene.on_loop(scene.links[link].mend)

    return act


def kill(*names: str) -> Callable[[Scene], Undo]:
    """As by the kernel, and not started again until it is undone."""

    def act(scene: Scene) -> Undo:
        for part in _parts(scene, names):
            part.is_held = True
            part.kill()

        def undo() -> None:
            for part in _parts(scene, names):
                part.is_held = False

        return undo

    return act


def freeze(name: str) -> Callable[[Scene], Undo]:
    def act(scene: Scene) -> Undo:
        [part] = _parts(scene, (name,))
        part.pause()
        return part.resume

    return act


def kill_engines(scene: Scene) -> Undo:
    """Three times, each as soon as the worker has started another one: a single time is mended within a second."""
    [part] = _parts(scene, ("gpu-1",))
    killed: set[int] = set()
    while len(killed) < NUM_ENGINE_KILLS:
        pid = wait_until(lambda: (found := part.engine_pid()) not in killed and found, "there is another engine")
        time.sleep(ENGINE_SECONDS)  # it has been scraped
        send_to([pid], signal.SIGKILL)
        killed.add(pid)
    return lambda: None


def restart_with(name: str, **variables: str) -> Callable[[Scene], Undo]:
    """Start a part again with other variables; CLOCK stands for a library that shifts the clock."""

    def act(scene: Scene) -> Undo:
        [part] = _parts(scene, (name,))
        usual, start = part.environment, part.start_process
        part.environment = usual | {key: value.replace("CLOCK", _clock_shim(scene)) for key, value in variables.items()}
        part.start_process = start_python
        part.kill()
        scene.plant.watch()
        wait_until(lambda: _restarted(scene, part), f"{name} runs again", pause_seconds=0.2)

        def undo() -> None:
            part.environment, part.start_process = usual, start
            part.kill()

        return undo

    return act


def _restarted(scene: Scene, part: Part) -> bool:
    scene.plant.watch()
    return part.is_running and _answers(scene.plant.api_urls[0])


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health/live", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def _clock_shim(scene: Scene) -> str:
    library = scene.plant.folder / "clock.so"
    if not library.exists():
        source = scene.plant.folder / "clock.c"
        source.write_text(CLOCK_SHIM)
        subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
    return str(library)


def _parts(scene: Scene, names: tuple[str, ...]) -> list[Part]:
    return [part for part in scene.plant.parts if part.name in names]


def _ignore(_: object) -> None:
    return None


AWAY = r"PostgreSQL gives no connection: (nothing listens|it is st|it recovers)|the database does not answer"
HANGS = r"the database does not answer within"
DOCTOR_AWAY = r"fail  database: it does not answer"
DOCTOR_DATABASE = r"it sees that (the database does not answer|PostgreSQL gives no connection)"
SILENT = r"a worker is silent \(of fake"

CAUSES = [
    Cause("PostgreSQL is stopped", stop_server("postgres"), AWAY, DOCTOR_AWAY, "database_unavailable"),
    Cause("PostgreSQL is frozen", freeze_server("postgres"), HANGS, DOCTOR_AWAY, "database_unavailable"),
    Cause(
        "PostgreSQL's disk is full",
        fill_disk,
        r"disk is full",
        r"fail  disk of the database: it is full",
        "database_full",
        needs_small_disk=True,
    ),
    Cause("a table is locked", lock_table("jobs"), r"somebody\): end", r"fail  locks: .*somebody", "database_locked"),
    Cause(
        "another table is locked", lock_table("workers"), r"somebody\): end", r"fail  locks: .*some", "database_locked"
    ),
    Cause(
        "no connection is left",
        use_up_connections,
        r"connections of PostgreSQL are in use|no connection: raise",
        r"fail  connections: none is left|connections are in use",
        "database_connections",
    ),
    Cause("Redis is stopped", stop_server("redis"), "Redis does not answer", "fail  Redis", "redis_unavailable"),
    Cause("Redis is frozen", freeze_server("redis"), "Redis does not answer", "fail  Redis", "redis_unavailable"),
    Cause(
        "Redis is full",
        configure_redis("maxmemory", "1", "0"),
        "Redis has no memory",
        "fail  writes to Redis: it has no memory left",
        "redis_full",
    ),
    Cause(
        "Redis takes no writes",
        configure_redis("min-replicas-to-write", "1", "0"),
        "Redis refuses to write",
        "fail  writes to Redis",
        "redis_refuses",
    ),
    Cause(
        "an API is cut off from PostgreSQL", cut("api-1 to postgres"), HANGS, DOCTOR_DATABASE, "database_unavailable"
    ),
    Cause(
        "an API is cut off from Redis",
        cut("api-1 to redis"),
        "Redis does not answer",
        "it sees that Redis does not answer",
        "redis_unavailable",
    ),
    Cause(
        "a worker is cut off from PostgreSQL",
        cut("gpu-1 to postgres"),
        SILENT,
        r"gpu-1\S* \(fake\) has been silent",
        "worker_silent",
    ),
    Cause("a worker is cut off from Redis", cut("gpu-1 to redis"), None, None, None),
    Cause(
        "a worker is killed",
        kill("gpu-1"),
        SILENT,
        r"gpu-1\S* \(fake\) has been silent",
        "worker_silent",
    ),
    Cause(
        "a worker is frozen",
        freeze("gpu-2"),
        SILENT,
        r"gpu-2\S* \(fake\) has been silent",
        "worker_silent",
    ),
    Cause("all workers are killed", kill("gpu-1", "gpu-2"), "no worker is ready", "fail  workers", "no_worker"),
    Cause("an engine is killed again and again", kill_engines, None, None, "CeleriacEngineEnds"),
    Cause(
        "maintenance is killed",
        kill("maintenance"),
        "maintenance is silent",
        "fail  maintenance: it is silent",
        "maintenance_silent",
    ),
    Cause(
        "maintenance is frozen",
        freeze("maintenance"),
        "maintenance is silent",
        "fail  maintenance: it is silent",
        "maintenance_silent",
    ),
    Cause("an API is killed", kill("api-2"), None, "fail  API", "CeleriacTargetDown", doctor_api=1),
    Cause(
        "an API's clock is off",
        restart_with("api-1", LD_PRELOAD="CLOCK"),
        "clock is 90.* ahead",
        "clock is 90.* ahead",
        "clock",
    ),
]
