"""A prepared process is like any other, but for its imports."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.prepared import Nursery, PreparedProcess
from tests.waiting import wait_until

#: Runs a statement that comes as an argument.
MODULE, OPTIONS = "timeit", ["-n", "1", "-r", "1"]


@pytest.fixture
def nursery() -> Iterator[Nursery]:
    nursery = Nursery(["json"])
    yield nursery
    nursery.close()


def start_sleeping(nursery: Nursery) -> PreparedProcess:
    return nursery.start(MODULE, [*OPTIONS, "import time; time.sleep(600)"], environment={})


def test_it_has_an_environment_descriptors_and_a_session_of_its_own(nursery: Nursery, tmp_path: Path) -> None:
    read_fd, write_fd = os.pipe()
    with (tmp_path / "output").open("wb") as output:
        process = nursery.start(
            MODULE,
            [
                *OPTIONS,
                f"import os; os.write({write_fd}, b'to you'); print(dict(os.environ), os.getsid(0), flush=True)",
            ],
            environment={"NAME": "value"},
            output=output,
            pass_fds=[write_fd],
            start_new_session=True,
        )
    os.close(write_fd)
    assert process.wait() == 0
    assert (tmp_path / "output").read_text().startswith(f"{{'NAME': 'value'}} {process.pid}\n")
    with os.fdopen(read_fd, "rb") as pipe:
        assert pipe.read() == b"to you"


def test_it_knows_what_it_was_started_as(nursery: Nursery, tmp_path: Path) -> None:
    """A worker that follows its servers elsewhere replaces itself by the same command."""
    statement = "import sys; print(sys.orig_argv)"
    with (tmp_path / "output").open("wb") as output:
        assert nursery.start(MODULE, [*OPTIONS, statement], environment={}, output=output).wait() == 0
    command = [sys.executable, "-m", MODULE, *OPTIONS, statement]
    assert (tmp_path / "output").read_text().startswith(f"{command}\n")


def test_its_exit_code_is_told_also_where_a_signal_ends_it(nursery: Nursery) -> None:
    assert nursery.start("json.tool", ["/none"], environment={}).wait() != 0
    process = start_sleeping(nursery)
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.01)
    process.terminate()
    assert process.wait() == -signal.SIGTERM
    process.kill()  # whoever has its number now


def test_it_ends_with_the_nursery(nursery: Nursery) -> None:
    process = start_sleeping(nursery)
    nursery.close()
    wait_until(lambda: process.poll() is not None)
    assert process.returncode == -signal.SIGKILL
