"""What `causes` does to the running system; each act returns how it is undone."""

import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import httpx
import psycopg

from local.servers import EmbeddedServer
from tests.chaos.cause_scene import Scene, Undo
from tests.chaos.plant import Part, send_to, start_python
from tests.waiting import wait_until

BROKEN_MODELS = """
[[models]]
id = "fake"
path = "/nowhere"
max_model_len = 4096
"""
NUM_ENGINE_KILLS, ENGINE_SECONDS = 3, 6.0
LATENCY_SECONDS = 0.3  # each way

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


def slow_down(link: str) -> Callable[[Scene], Undo]:
    def act(scene: Scene) -> Undo:
        def set_latency(seconds: float) -> None:
            scene.links[link].latency_seconds = seconds

        scene.on_loop(lambda: set_latency(LATENCY_SECONDS))
        return lambda: scene.on_loop(lambda: set_latency(0.0))

    return act


def sit_on_a_row(scene: Scene) -> Undo:
    """A transaction that somebody has left open."""
    connection = psycopg.connect(f"{scene.plant.postgres.url}&application_name=somebody")
    connection.execute("UPDATE tenant_load SET num_queued = num_queued")
    return connection.close


def take_no_writes(scene: Scene) -> Undo:
    def set_read_only(value: str) -> None:
        with scene.plant.connect() as connection:
            connection.execute("SET default_transaction_read_only = off")
            connection.execute(f"ALTER SYSTEM SET default_transaction_read_only = {value}")
            connection.execute("SELECT pg_reload_conf()")

    set_read_only("on")
    return lambda: set_read_only("off")


def refuse_us(scene: Scene) -> Undo:
    """As of a password that was changed: nobody gets a connection any more."""
    return admit_by(scene, "reject")


def admit_by(scene: Scene, method: str) -> Undo:
    """How PostgreSQL lets new connections in; those that there are end."""
    hba = scene.plant.folder / "postgres/data/pg_hba.conf"
    usual = hba.read_text()
    pid = scene.plant.postgres.pid
    assert pid is not None
    with scene.plant.connect() as connection:
        hba.write_text(f"local all all {method}\nhost all all all {method}\n")
        send_to([pid], signal.SIGHUP)
        time.sleep(0.5)  # it reads the file when it gets to it
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND datid IS NOT NULL"
        )

    def undo() -> None:
        hba.write_text(usual)
        send_to([pid], signal.SIGHUP)

    return undo


def set_schema_back(scene: Scene) -> Undo:
    with scene.plant.connect() as connection:
        row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
        connection.execute("UPDATE alembic_version SET version_num = '0003'")
    assert row is not None
    newest = row[0]

    def undo() -> None:
        with scene.plant.connect() as connection:
            connection.execute("UPDATE alembic_version SET version_num = %s", (newest,))

    return undo


def make_replica(scene: Scene) -> Undo:
    """Of a server that is away, as after a failover."""
    client = scene.plant.redis_client()
    client.replicaof("127.0.0.1", "9")
    return lambda: _ignore(client.replicaof("NO", "ONE"))


def change_password(scene: Scene) -> Undo:
    client = scene.plant.redis_client()
    usual = str(client.config_get("requirepass")["requirepass"])
    client.config_set("requirepass", "another")
    client.client_kill_filter(_type="normal", skipme=True)
    return lambda: _ignore(client.config_set("requirepass", usual))


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


def strike_engine(name: str, what: signal.Signals) -> Callable[[Scene], Undo]:
    def act(scene: Scene) -> Undo:
        [part] = _parts(scene, (name,))
        pid = wait_until(part.engine_pid, "there is an engine")
        send_to([pid], what)
        return lambda: send_to([pid], signal.SIGCONT)

    return act


def ask_for_unserved(scene: Scene) -> Undo:
    with httpx.Client(base_url=scene.plant.api_urls[0], timeout=10) as http:
        body = {"prompt": "A story", "model": "unserved", "params": {"max_tokens": 20}}
        job_id = http.post("/v1/jobs", json=body).raise_for_status().json()["id"]
    return lambda: _ignore(httpx.post(f"{scene.plant.api_urls[0]}/v1/jobs/{job_id}/cancel", timeout=10))


def drain_all(scene: Scene) -> Undo:
    url = scene.plant.api_urls[0]
    models = httpx.get(f"{url}/v1/admin/models", timeout=10).json()["data"]
    names = [worker["hostname"] for model in models for worker in model["workers"]]

    def order(what: str) -> None:
        for name in names:
            httpx.post(f"{url}/v1/admin/workers/{name}/{what}", timeout=10).raise_for_status()

    order("drain")
    return lambda: order("resume")


def break_model(scene: Scene) -> Undo:
    """A worker that is started again finds its model's files gone."""
    broken = scene.plant.folder / "broken.toml"
    broken.write_text(BROKEN_MODELS)
    [part] = _parts(scene, ("gpu-1",))
    usual = part.environment
    part.environment = usual | {"CELERIAC_MODELS_FILE": str(broken)}
    part.kill()
    part.start()

    def undo() -> None:
        part.environment = usual
        if part.is_running:
            part.kill()

    return undo


def fill_log(scene: Scene) -> Undo:
    [part] = _parts(scene, ("api-1",))
    usual, part.log_path = part.log_path, Path("/dev/full")
    part.kill()
    scene.plant.watch()
    wait_until(lambda: _restarted(scene, part), "it runs again", pause_seconds=0.2)

    def undo() -> None:
        part.log_path = usual
        part.kill()

    return undo


def break_archive(scene: Scene) -> Undo:
    """A file in the place of its folder; and a job that is due for it."""
    archive = scene.plant.folder / "archive"
    shutil.rmtree(archive, ignore_errors=True)
    archive.write_text("")
    due = """UPDATE jobs SET prune_at = now() WHERE id IN (
        SELECT id FROM jobs WHERE status = 'completed' AND prune_at IS NOT NULL LIMIT 1)"""
    with scene.plant.connect() as connection:
        wait_until(lambda: connection.execute(due).rowcount, "a job has ended")
    return archive.unlink


def fill_disk_to_the_log(scene: Scene) -> Undo:
    """Also the log of transactions, without which PostgreSQL ends."""
    empty = fill_disk(scene)
    with suppress(psycopg.Error), scene.plant.connect() as connection:
        for _ in range(100):
            connection.execute("SELECT pg_logical_emit_message(true, 'x', repeat('x', 1000000))")

    def undo() -> None:
        empty()
        scene.plant.postgres.stop()
        scene.plant.postgres.start()

    return undo


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
