"""The launcher with real processes: restarts, the order of stopping, and what a kill -9 leaves behind."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest

from local.lock import AlreadyUp, UpLock
from local.processes import Launcher, Service, free_port, is_free, set_aside, trim_log
from settings import find_running
from tests.waiting import wait_until

SLEEP = "import time; time.sleep(600)"
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
)
WITH_CHILD = (
    "import subprocess, sys, time\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    "print(child.pid, flush=True); time.sleep(600)"
)

MakeService = Callable[..., Service]


@pytest.fixture
def make_service(tmp_path: Path) -> Iterator[MakeService]:
    """A service that runs some Python; ended after the test."""
    made: list[Service] = []

    def make(code: str, *, title: str = "service", stop_seconds: float = 5.0) -> Service:
        service = Service(
            title=title,
            command=[sys.executable, "-c", code],
            is_ready=lambda: True,
            log_path=tmp_path / f"{title}.log",
            folder=tmp_path,
            environment=lambda: dict(os.environ),
            stop_seconds=stop_seconds,
        )
        made.append(service)
        return service

    yield make
    for service in made:
        service.finish_stop()


def is_alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_a_killed_process_is_restarted_and_reported_in_one_line(make_service: MakeService) -> None:
    service, lines = make_service(SLEEP, title="API"), list[str]()
    launcher = Launcher(say=lines.append, services=[service])
    service.start()
    assert service.process is not None
    first_pid = service.process.pid
    service.process.kill()
    service.process.wait()
    while not service.is_running:
        launcher.restart_the_dead()
    assert service.process.pid != first_pid
    assert len(lines) == 1
    assert lines[0].startswith("API was killed by SIGKILL after 0 s; restarting in 0.5 s, log: ")


def test_each_early_death_doubles_the_pause(make_service: MakeService) -> None:
    service, lines = make_service("raise SystemExit(3)"), list[str]()
    for pause in ("0.5", "1", "2", "4"):
        service.start()
        assert service.process is not None
        service.process.wait()
        lines.append(service.bury())
        assert f"exited with code 3 after 0 s; restarting in {pause} s" in lines[-1]


@pytest.mark.parametrize("line", ["leaving: no weights", '{"level":"CRITICAL","message":"leaving: no weights"}'])
def test_what_says_that_a_restart_is_of_no_use_gets_a_long_pause_and_is_quoted(
    make_service: MakeService, line: str
) -> None:
    service, lines = make_service(f"import os; print({line!r}); raise SystemExit(os.EX_CONFIG)"), list[str]()
    for _ in range(2):
        service.start()
        assert service.process is not None
        service.process.wait()
        lines.append(service.bury())
        assert "service cannot work: leaving: no weights; restarting in 300 s, log: " in lines[-1]
        assert service.last_words == "leaving: no weights"


def test_a_dead_process_takes_its_children_along(make_service: MakeService) -> None:
    service = make_service(WITH_CHILD)
    service.start()
    wait_until(lambda: service.log_path.read_text().strip())
    child_pid = int(service.log_path.read_text())
    assert service.process is not None
    service.process.kill()
    service.process.wait()
    service.bury()
    wait_until(lambda: not is_alive(child_pid))


def test_what_ignores_term_is_killed_after_its_time(make_service: MakeService) -> None:
    service = make_service(STUBBORN, stop_seconds=0.3)
    service.start()
    wait_until(lambda: service.log_has(b"up"))
    Launcher(say=print, services=[service]).stop([[service]])
    assert not service.is_running


def test_a_second_request_hurries_the_stop(make_service: MakeService) -> None:
    service = make_service(STUBBORN, stop_seconds=600)
    service.start()
    wait_until(lambda: service.log_has(b"up"))
    Launcher(say=print, services=[service], is_hurried=lambda: True).stop([[service]])
    assert not service.is_running


def test_tiers_stop_one_after_the_other(make_service: MakeService, tmp_path: Path) -> None:
    note_end = (
        "import pathlib, signal, sys, time\n"
        "def end(*_):\n"
        "    with open('order', 'a') as file: file.write('{title} ')\n"
        "    sys.exit()\n"
        "signal.signal(signal.SIGTERM, end); print('up', flush=True); time.sleep(600)"
    )
    services = [make_service(note_end.format(title=title), title=title) for title in ("worker", "api")]
    for service in services:
        service.start()
    for service in services:
        wait_until(partial(service.log_has, b"up"))
    Launcher(say=print, services=services).stop([[services[0]], [services[1]]])
    assert (tmp_path / "order").read_text() == "worker api "


def test_nothing_outlives_a_launcher_that_is_killed(tmp_path: Path) -> None:
    owner_code = f"""
import os, sys, time
from pathlib import Path
from local.processes import Service
service = Service("s", [sys.executable, "-c", {WITH_CHILD!r}], lambda: True, Path({str(tmp_path / "log")!r}),
                  Path("."), lambda: dict(os.environ))
service.start()
print(service.process.pid, flush=True)
time.sleep(600)
"""
    owner = subprocess.Popen([sys.executable, "-c", owner_code], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    service_pid = int(owner.stdout.readline())
    wait_until(lambda: (tmp_path / "log").read_text().strip())
    child_pid = int((tmp_path / "log").read_text())
    owner.send_signal(signal.SIGKILL)
    owner.communicate()
    wait_until(lambda: not is_alive(service_pid))
    wait_until(lambda: not is_alive(child_pid))  # TERM does not reach it; the guard's KILL does


def test_a_second_up_is_told_of_the_first(tmp_path: Path) -> None:
    first = UpLock(tmp_path).take()
    first.write({"pid": 4711, "api_url": "http://127.0.0.1:8001"})
    with pytest.raises(AlreadyUp, match=r"pid 4711, http://127.0.0.1:8001.*Ctrl-C"):
        UpLock(tmp_path).take()
    running = find_running(tmp_path)
    assert running is not None
    assert running["api_url"] == "http://127.0.0.1:8001"
    first.release()
    assert find_running(tmp_path) is None
    UpLock(tmp_path).take().release()


def test_the_lock_of_a_killed_up_is_free(tmp_path: Path) -> None:
    code = f"""
import time
from pathlib import Path
from local.lock import UpLock
lock = UpLock(Path({str(tmp_path)!r})).take()
print("held", flush=True)
time.sleep(600)
"""
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    assert owner.stdout.readline() == "held\n"
    assert find_running(tmp_path) == {"pid": owner.pid}
    owner.kill()
    owner.communicate()
    assert find_running(tmp_path) is None
    UpLock(tmp_path).take().release()


def test_a_taken_port_moves_on_to_the_next_free_one() -> None:
    port = free_port("127.0.0.1", 0)
    with socket.create_server(("127.0.0.1", port)):
        assert not is_free("127.0.0.1", port)
        assert free_port("127.0.0.1", port) > port
    assert is_free("127.0.0.1", port)


def test_the_log_of_the_last_run_is_kept_beside_the_new_one(tmp_path: Path) -> None:
    log_path = tmp_path / "logs" / "api.log"
    set_aside(log_path)
    log_path.write_text("first run")
    set_aside(log_path)
    assert not log_path.exists()
    assert log_path.with_suffix(".log.1").read_text() == "first run"


def test_a_log_that_grows_too_long_begins_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("local.processes.MAX_LOG_BYTES", 10)
    log_path = tmp_path / "api.log"
    with log_path.open("ab", buffering=0) as log:
        log.write(b"more than ten bytes")
        trim_log(log_path)
        log.write(b"next")
    assert log_path.read_bytes() == b"next"
    assert log_path.with_suffix(".log.1").read_bytes() == b"more than ten bytes"
