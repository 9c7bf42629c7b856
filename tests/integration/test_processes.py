"""Child processes, real ones: restarts, the order of stopping, and what a kill -9 leaves behind."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest

from local.lifetime import ending_with_us
from local.lock import AlreadyUp, UpLock
from local.processes import SERVER_PORTS, ChildProcess, free_port, is_free, set_aside, stop_in_turn, trim_log
from settings import ROOT, find_running
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

MakeProcess = Callable[..., ChildProcess]


@pytest.fixture
def make_process(tmp_path: Path) -> Iterator[MakeProcess]:
    """A process that runs some Python; ended after the test."""
    made: list[ChildProcess] = []

    def make(code: str, *, title: str = "service", stop_seconds: float = 5.0) -> ChildProcess:
        made.append(
            ChildProcess(
                title,
                lambda: [sys.executable, "-c", code],
                tmp_path / f"{title}.log",
                tmp_path,
                stop_seconds=stop_seconds,
            )
        )
        return made[-1]

    yield make
    for process in made:
        process.kill()


def is_alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def end(process: ChildProcess) -> str:
    """Kill it, and notice."""
    assert process.popen is not None
    os.kill(process.popen.pid, signal.SIGKILL)
    return wait_for_end(process)


def wait_for_end(process: ChildProcess) -> str:
    told: str = wait_until(process.revive)
    return told


def test_a_killed_process_is_restarted_and_reported_in_one_line(make_process: MakeProcess) -> None:
    process = make_process(SLEEP, title="API")
    process.start()
    first_pid = process.pid
    told = end(process)
    assert told.startswith("API was killed by SIGKILL after ")
    assert " s; restarting in 0.5 s, log: " in told
    while not process.is_running:
        assert process.revive() is None
    assert process.pid != first_pid


def test_each_early_death_doubles_the_pause(make_process: MakeProcess) -> None:
    process = make_process("raise SystemExit(3)")
    process.start()
    for pause in ("0.5", "1", "2"):
        told = wait_for_end(process)
        assert "exited with code 3 after " in told
        assert f" s; restarting in {pause} s" in told
        process.restart_at = 0  # now
        process.revive()


@pytest.mark.parametrize("line", ["leaving: no weights", '{"level":"CRITICAL","message":"leaving: no weights"}'])
def test_what_says_that_a_restart_is_of_no_use_gets_a_long_pause_and_is_quoted(
    make_process: MakeProcess, line: str
) -> None:
    process = make_process(f"import os; print({line!r}); raise SystemExit(os.EX_CONFIG)")
    for _ in range(2):
        process.start()
        assert "service cannot work: leaving: no weights; restarting in 300 s, log: " in wait_for_end(process)
        assert process.last_words == "leaving: no weights"


def test_a_dead_process_takes_its_children_along(make_process: MakeProcess) -> None:
    process = make_process(WITH_CHILD)
    process.start()
    wait_until(lambda: process.log_path.read_text().strip())
    child_pid = int(process.log_path.read_text())
    end(process)
    wait_until(lambda: not is_alive(child_pid))


def test_what_ignores_term_is_killed_after_its_time(make_process: MakeProcess) -> None:
    process = make_process(STUBBORN, stop_seconds=0.3)
    process.start()
    wait_until(lambda: process.log_has(b"up"))
    process.stop()
    assert not process.is_running


def test_a_frozen_process_is_stopped(make_process: MakeProcess) -> None:
    process = make_process(SLEEP, stop_seconds=0.1)
    process.start()
    process.send(signal.SIGSTOP)
    process.stop()
    assert not process.is_running


def test_a_second_request_hurries_the_stop(make_process: MakeProcess) -> None:
    process = make_process(STUBBORN, stop_seconds=600)
    process.start()
    wait_until(lambda: process.log_has(b"up"))
    stop_in_turn([[process]], is_hurried=lambda: True)
    assert not process.is_running


def test_tiers_stop_one_after_the_other(make_process: MakeProcess, tmp_path: Path) -> None:
    note_end = (
        "import pathlib, signal, sys, time\n"
        "def end(*_):\n"
        "    with open('order', 'a') as file: file.write('{title} ')\n"
        "    sys.exit()\n"
        "signal.signal(signal.SIGTERM, end); print('up', flush=True); time.sleep(600)"
    )
    processes = [make_process(note_end.format(title=title), title=title, stop_seconds=60) for title in ("one", "two")]
    for process in processes:
        process.start()
    for process in processes:
        wait_until(partial(process.log_has, b"up"))
    stop_in_turn([[processes[0]], [processes[1]]])
    assert (tmp_path / "order").read_text() == "one two "


def test_a_process_outlives_the_thread_that_asked_for_it(make_process: MakeProcess) -> None:
    process = make_process("import time; print('up', flush=True); time.sleep(600)")
    thread = threading.Thread(target=process.start)
    thread.start()
    thread.join()
    wait_until(lambda: process.log_has(b"up"))
    assert process.is_running


def as_on_macos(command: list[str]) -> list[str]:
    """The same, without prctl."""
    code = "import runpy, sys; sys.platform = 'darwin'; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    python, options, *others = command
    return [python, options, "-c", code, *others]


@pytest.mark.parametrize("adapt", ["list", "as_on_macos"])
def test_nothing_outlives_a_killed_parent(adapt: str, tmp_path: Path) -> None:
    owner_code = f"""
        import subprocess, sys, time
        from local.lifetime import ending_with_us
        from tests.integration.test_processes import as_on_macos
        command = {adapt}(ending_with_us([sys.executable, "-c", "print('up', flush=True); {SLEEP}"]))
        process = subprocess.Popen(command, start_new_session=True)
        print(process.pid, flush=True)
        time.sleep(600)
    """
    owner = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(owner_code)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    pid = int(owner.stdout.readline())
    assert owner.stdout.readline() == "up\n"
    group = [pid, *(child.pid for child in psutil.Process(pid).children())]
    owner.kill()
    owner.wait()
    wait_until(lambda: not any(map(is_alive, group)))
    owner.communicate()


def test_what_is_started_too_late_does_not_start() -> None:
    """Its parent ended before it could ask to end with it."""
    command = ending_with_us(["echo", "started"])
    command[3] = str(2**22 + 1)  # no process has this pid
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert done.stdout == ""
    assert "the parent ended" in done.stderr


def test_a_command_gets_its_signals_as_any_other_does() -> None:
    """An exec hands on which signals are ignored, and Python ignores SIGPIPE."""
    ignored = ["grep", "^SigIgn", "/proc/self/status"]
    bare = subprocess.run(ignored, capture_output=True, text=True, check=True).stdout
    assert subprocess.run(ending_with_us(ignored), capture_output=True, text=True, check=True).stdout == bare


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_runs_it_and_it_ends_with_us_all_the_same(tmp_path: Path) -> None:
    owner_code = """
        import subprocess, time
        from local.lifetime import ending_with_us
        subprocess.Popen(ending_with_us(["sh", "-c", "id -un; exec sleep 600"], user="nobody"))
        time.sleep(600)
    """
    owner = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(owner_code)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    assert owner.stdout.readline() == "nobody\n"
    child = psutil.Process(owner.pid).children()[0]
    owner.kill()
    wait_until(lambda: not is_alive(child.pid))
    owner.communicate()


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


def test_any_free_port_is_none_that_an_outgoing_connection_may_be_given() -> None:
    """Else it could be taken between the look and the start of the server."""
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    if first < SERVER_PORTS.stop:
        pytest.skip(f"on this machine outgoing connections have ports from {first} on")
    assert not any(first <= free_port("127.0.0.1", 0) <= last for _ in range(20))


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
