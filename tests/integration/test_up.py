"""`celeriac up` as a user meets it: started as a process with servers of its own, killed, and started again."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.waiting import wait_until

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
MODELS = """
[[models]]
id = "celeriac-mini"
path = "fake"
backend = "fake"
max_model_len = 2048
fake = { step_seconds = 0.005 }
"""


class RunningUp:
    """One `celeriac up` and what it has printed so far."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment
        self.process = subprocess.Popen(
            [sys.executable, "-m", "celeriac", "up"],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.output = ""
        self._reading = threading.Lock()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as output:
            while piece := output.read(1):
                with self._reading:
                    self.output += piece

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Until it has printed this."""

        def found() -> re.Match[str] | None:
            with self._reading:
                return re.search(pattern, self.output)

        match: re.Match[str] = wait_until(found, f"it prints {pattern!r}")
        return match

    def wait_until_up(self) -> tuple[str, str]:
        """The API's URL and the first job's id."""
        url = self.wait_for(r"API +(http://\S+)/docs")[1]
        return url, self.wait_for(r"(job_\w+): completed")[1]

    def child(self, *words: str) -> psutil.Process:
        """The process of ours whose command line has these words."""
        for process in psutil.Process(self.process.pid).children():
            if set(words) <= set(process.cmdline()):
                return process
        raise AssertionError(f"no process runs {words}")

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        self.process.kill()
        self.wait()

    def wait(self) -> int:
        """Its exit code, with all output read."""
        exit_code = self.process.wait()
        self._reader.join()
        return exit_code


StartUp = Callable[[], RunningUp]


@contextmanager
def new_folder() -> Iterator[Path]:
    """Not pytest's own temporary folder: that one is closed to the system user PostgreSQL runs as under root."""
    folder = Path(tempfile.mkdtemp(prefix="celeriac-up-"))
    yield folder
    wait_until_gone(folder)
    shutil.rmtree(folder)


def environment_in(folder: Path) -> dict[str, str]:
    (folder / "models.toml").write_text(MODELS)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("CELERIAC_")}
    return inherited | {
        "CELERIAC_DATA_DIR": str(folder / "data"),
        "CELERIAC_MODELS_FILE": str(folder / "models.toml"),
        "CELERIAC_PORT": "0",
        "CELERIAC_FLOWER_PORT": "0",
        "CELERIAC_LEASE_SECONDS": "3",  # what a killed worker held is rescued sooner
    }


@pytest.fixture
def folder() -> Iterator[Path]:
    with new_folder() as folder:
        yield folder


@pytest.fixture
def environment(folder: Path) -> dict[str, str]:
    return environment_in(folder)


@pytest.fixture
def start_up(environment: dict[str, str]) -> Iterator[StartUp]:
    started: list[RunningUp] = []

    def start() -> RunningUp:
        started.append(RunningUp(environment))
        return started[-1]

    yield start
    for up in started:
        if up.process.poll() is None:
            up.kill()


@pytest.fixture(scope="module")
def shared_up() -> Iterator[RunningUp]:
    """For the tests that only use it, or kill what it restarts."""
    with new_folder() as folder:
        up = RunningUp(environment_in(folder))
        try:
            up.wait_until_up()
            yield up
            assert up.stop() == 0
        finally:
            if up.process.poll() is None:
                up.kill()


def celeriac(environment: dict[str, str], *arguments: str) -> "subprocess.Popen[str]":
    """Another command in the same folder: celeriac(environment, "jobs")."""
    command = [sys.executable, "-m", "celeriac", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


def wait_until_gone(folder: Path) -> None:
    """Until nothing runs there. Polls: the processes are not ours to wait for."""
    wait_until(lambda: not processes_of(folder), f"nothing runs in {folder}", pause_seconds=0.1)


def processes_of(folder: Path) -> list[str]:
    """The command lines of everything that runs on this data folder."""
    found = []
    for process in psutil.process_iter():
        try:
            told = f"{process.environ().get('CELERIAC_DATA_DIR', '')} {' '.join(process.cmdline())}"
            if str(folder) in told and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def submit(url: str, **params: Any) -> str:
    body = {"model": "celeriac-mini", "prompt": "Once", "params": params}
    return str(httpx.post(f"{url}/v1/jobs", json=body, timeout=30).raise_for_status().json()["id"])


def test_up_runs_a_job_is_alone_in_its_folder_and_keeps_its_jobs(
    start_up: StartUp, folder: Path, environment: dict[str, str]
) -> None:
    up = start_up()
    url, job_id = up.wait_until_up()
    up.wait_for("Celeriac is up after")
    health = httpx.get(f"{url}/health", timeout=30).json()
    assert (health["status"], health["reasons"]) == ("ok", [])
    assert "Not all is well" not in up.output
    flower_url = up.wait_for(r"Flower +(http://\S+)")[1]
    assert httpx.get(f"{flower_url}/healthcheck", timeout=30).status_code == 200

    second = celeriac(environment, "up")
    assert "celeriac up is already running here" in second.communicate()[1]
    assert second.returncode == 1
    assert job_id in celeriac(environment, "jobs").communicate()[0]  # it finds the API without being told

    assert up.stop() == 0
    assert up.output.endswith("Stopped.\n")
    assert processes_of(folder) == []

    again = start_up()
    new_url, _ = again.wait_until_up()
    assert httpx.get(f"{new_url}/v1/jobs/{job_id}", timeout=30).json()["status"] == "completed"
    assert again.stop() == 0


@pytest.mark.skipif(shutil.which("curl") is None, reason="the commands of the README are curl's")
def test_the_commands_of_the_readme_work_as_they_stand(shared_up: RunningUp) -> None:
    url, job_id = shared_up.wait_until_up()
    command = f"{sys.executable} -m celeriac"
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    # One needs a model from the hub, the other one that the fake back end has not got.
    blocks = [
        block
        for block in blocks
        if not any(word in block for word in ("celeriac worker", "/v1/embeddings", "make run"))
    ]
    assert len(blocks) >= 4
    for block in blocks:
        block = block.replace("http://127.0.0.1:8000", url).replace("job_01...", job_id)
        script = re.sub(r"^curl", "curl --fail -sS", block, flags=re.MULTILINE).replace(".venv/bin/celeriac", command)
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=ROOT,
            env=shared_up.environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
        assert done.stdout


def test_what_is_killed_is_restarted_and_a_watched_stream_stays_whole(shared_up: RunningUp) -> None:
    url, _ = shared_up.wait_until_up()
    job_id = submit(url, max_tokens=1500, ignore_eos=True)
    with celeriac(shared_up.environment, "watch", job_id) as watching:
        assert watching.stdout is not None
        assert watching.stderr is not None
        beginning = watching.stdout.read(40)
        for words in (("celeriac", "api"), ("gpu_worker.app", "worker")):  # at once, before the job can end
            shared_up.child(*words).kill()
        shared_up.wait_for(r"API was killed by SIGKILL after \d+ s; restarting in 0\.5 s")
        shared_up.wait_for(r"GPU worker was killed by SIGKILL after \d+ s; restarting in 0\.5 s")
        text, notes = watching.stdout.read(), watching.stderr.read()
    assert watching.returncode == 0, notes
    job = httpx.get(f"{url}/v1/jobs/{job_id}", timeout=30).json()
    assert job["attempt"] == 2
    assert beginning + text == job["output"]["text"] + "\n"


def test_a_killed_up_leaves_nothing_behind_and_its_jobs_in_place(start_up: StartUp, folder: Path) -> None:
    up = start_up()
    url, first_job_id = up.wait_until_up()
    running_job_id = submit(url, max_tokens=1000, ignore_eos=True)
    up.kill()
    wait_until_gone(folder)

    again = start_up()
    new_url, _ = again.wait_until_up()
    assert httpx.get(f"{new_url}/v1/jobs/{first_job_id}", timeout=30).json()["status"] == "completed"
    assert httpx.get(f"{new_url}/v1/jobs/{running_job_id}?wait=60", timeout=70).json()["status"] == "completed"
    assert again.stop() == 0


def test_a_part_that_cannot_start_ends_it_with_the_reason(environment: dict[str, str], folder: Path) -> None:
    up = RunningUp(environment | {"FLOWER_MAX_TASKS": "many"})
    assert up.wait() == 1, up.output
    up.wait_for(r"Flower does not start; its log ends:(.|\n)*many")
    assert processes_of(folder) == []


def test_a_model_that_cannot_be_loaded_ends_it_with_the_reason(environment: dict[str, str], folder: Path) -> None:
    (folder / "models.toml").write_text(MODELS.replace("step_seconds", "no_such_knob"))
    up = RunningUp(environment)
    assert up.wait() == 1, up.output
    up.wait_for(r"(?s)Error: GPU worker cannot work: exiting: model 'celeriac-mini' cannot be loaded: .*no_such_knob")
    assert up.output.count("GPU worker cannot work") == 2, "as it happens, and at the end"
    assert "Traceback" not in up.output
    assert processes_of(folder) == []


def test_a_terminal_that_goes_away_stops_it_in_good_order(environment: dict[str, str], folder: Path) -> None:
    command = [sys.executable, "-m", "celeriac", "up", "--no-first-job"]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as up:
        assert up.stdout is not None
        while "Try it" not in up.stdout.readline():
            assert up.poll() is None
        up.stdout.close()
        up.send_signal(signal.SIGHUP)
        assert up.wait() == 0
    assert "draining" in (folder / "data" / "logs" / "worker.log").read_text()  # asked to end, not killed by its guard
    assert processes_of(folder) == []
