"""Several API processes on one port: started as one command, each replaced when it dies, and ended together."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import psutil
import pytest

from local.lifetime import ending_with_us
from tests.integration.api_harness import body
from tests.waiting import SECONDS, wait_until

NUM_PROCESSES = 2


class Group:
    def __init__(self, environment: dict[str, str], log: Path, **options: str) -> None:
        self._log = log
        command = [sys.executable, "-m", "celeriac", "api", "--processes", str(NUM_PROCESSES)]
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                ending_with_us(command), env=os.environ | environment | options, stdout=output, stderr=output
            )
        wait_until(lambda: len(self._found(r"listening on http://127\.0\.0\.1:(\d+)")) == NUM_PROCESSES, "it listens")
        self.port = self._found(r"listening on http://127\.0\.0\.1:(\d+)")[0]
        self.own_ports = self._found(r"listens on port (\d+)")
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60)
        wait_until(lambda: all(map(self._is_live, self.own_ports)), "all answer")

    def _found(self, pattern: str) -> list[int]:
        return [int(port) for port in re.findall(pattern, self._log.read_text())]

    def _is_live(self, port: int) -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{port}/health/live", timeout=30).status_code == 200
        except httpx.HTTPError:
            return False

    @property
    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children()

    def num_requests(self) -> list[int]:
        """Those to /version that each process has counted."""
        texts = [httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=30).text for port in self.own_ports]
        pattern = r'celeriac_http_requests_total\{method="GET",route="/version",status="200"\} (\d+)'
        return [sum(int(number) for number in re.findall(pattern, text)) for text in texts]


@pytest.fixture
def group(database_url: str, redis_url: str, tmp_path: Path) -> Iterator[Group]:
    environment = {"DATABASE_URL": database_url, "REDIS_URL": redis_url, "PORT": "0", "LOG_FORMAT": "text"}
    models = tmp_path / "models.toml"
    models.write_text('[[models]]\nid = "fake"\npath = "none"\nbackend = "fake"\nmax_model_len = 4096\n')
    environment |= {"MODELS_FILE": str(models), "DATA_DIR": str(tmp_path / "data"), "API_DRAIN_SECONDS": "0"}
    started = Group({f"CELERIAC_{name}": value for name, value in environment.items()}, tmp_path / "api.log")
    with started.client:
        yield started
    started.process.kill()
    started.process.wait()


def test_connections_are_divided_and_each_process_tells_what_it_counts(group: Group) -> None:
    for _ in range(40):  # the chance that one process gets all of them: 2 in 10^12
        assert httpx.get(f"http://127.0.0.1:{group.port}/version", timeout=60).status_code == 200
    counted = group.num_requests()
    assert min(counted) > 0
    assert sum(counted) == 40
    refused = group.client.get("/metrics")
    assert refused.status_code == 501
    assert all(str(port) in refused.json()["error"]["message"] for port in group.own_ports)


def test_a_process_that_dies_is_replaced_and_what_arrives_meanwhile_is_answered(group: Group) -> None:
    before = {child.pid for child in group.children}
    assert len(before) == NUM_PROCESSES
    for child in group.children:
        child.kill()
    with ExitStack() as stack:  # each in its own connection
        for _ in range(8):
            client = stack.enter_context(httpx.Client(base_url=group.client.base_url, timeout=SECONDS))
            assert client.post("/v1/jobs", json=body()).status_code == 202
    after = {child.pid for child in group.children}
    assert len(after) == NUM_PROCESSES
    assert not before & after


def test_they_end_together(group: Group) -> None:
    children = group.children
    with group.client.stream("GET", f"/v1/jobs/{group.client.post('/v1/jobs', json=body()).json()['id']}/events") as it:
        lines = it.iter_lines()
        next(lines)
        group.process.send_signal(signal.SIGTERM)
        list(lines)  # it ends, and does not break off
    assert group.process.wait(SECONDS) == 0
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)


def test_none_outlives_its_parent(group: Group) -> None:
    children = group.children
    group.process.kill()
    wait_until(lambda: not any(child.is_running() for child in children), "they have ended")


#: The command is told to stop at the worst moment. Its second process waits for that; the first one ends by itself.
STOPPED = """
import os, signal, sys
from api.processes import ApiProcesses

own_pid = os.getpid()

def at(name):
    real = getattr(os, name)
    def call(*arguments):
        found = real(*arguments)
        pid = found if name == "fork" else found[0]
        if pid:
            print(name, flush=True)
            os.kill(own_pid, signal.SIGTERM)
        return found
    setattr(os, name, call)

def serve(sockets, ports):
    if sockets[1].getsockname()[1] != ports.own[0]:
        signal.pause()

at(sys.argv[1])
sys.exit(ApiProcesses("127.0.0.1", 0, 2, serve).run())
"""


@pytest.mark.parametrize(("moment", "times"), [("waitpid", 2), ("fork", 1)])
def test_it_stops_while_it_starts_one_or_takes_one_away(moment: str, times: int) -> None:
    command = ending_with_us([sys.executable, "-c", STOPPED, moment])
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, [moment] * times, "")
