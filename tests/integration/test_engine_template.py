"""The template of real engines: what has been imported must bear a fork, and the forks must compute."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from domain.catalog import ModelSpec
from gpu_worker.engine_process.frames import AddJob, StepDone
from gpu_worker.engine_process.supervisor import EngineExit, Supervisor
from settings import ROOT
from tests.waiting import wait_until

pytestmark = pytest.mark.slow

NUM_TOKENS = 20
SPEC = ModelSpec(id="mini", path=f"{ROOT}/models/celeriac-mini", max_model_len=256, max_num_seqs=2)

COMMAND = AddJob(
    job_id="job",
    attempt=1,
    prompt_token_ids=list(range(100, 140)),
    params={"temperature": 0.0},
    max_tokens=NUM_TOKENS,
    seed=1,
    priority=0,
    cache_salt="",
    committed_token_ids=[[]],
    num_emitted_chars=[0],
    finished_indexes=[],
)

ASK_FOR_DEVICES = """
import torch
def refuse(*_, **__):
    raise AssertionError("a GPU was asked for during an import")
for name in ("is_available", "device_count", "current_device", "get_device_capability", "_lazy_init"):
    setattr(torch.cuda, name, refuse)
from domain.catalog import ModelSpec
from gpu_worker.engine.backends import import_backend
for task in ("generation", "embedding"):
    import_backend(ModelSpec(id="any", path="none", max_model_len=64, task=task))
assert not torch.cuda.is_initialized()
"""


@pytest.fixture
def supervisor() -> Iterator[Supervisor]:
    supervisor = Supervisor(SPEC, heartbeat_seconds=5.0)
    yield supervisor
    supervisor.stop()


def test_importing_a_back_end_asks_for_no_gpu() -> None:
    asked = subprocess.run([sys.executable, "-c", ASK_FOR_DEVICES], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert asked.returncode == 0, asked.stderr


def test_a_second_engine_of_the_same_template_computes_what_the_first_did(supervisor: Supervisor) -> None:
    tokens = generate(supervisor)
    first = engine_of(supervisor)
    template = first.parent()
    assert template is not None
    assert template.num_threads() == 1
    first.kill()
    assert end_of(supervisor).exit_code == -signal.SIGKILL
    assert generate(supervisor) == tokens
    assert engine_of(supervisor) != first
    assert engine_of(supervisor).parent() == template
    assert template.num_threads() == 1


def generate(supervisor: Supervisor) -> list[int]:
    """The tokens of a greedy job, as soon as there is an engine."""
    tokens: list[int] = []

    def is_ready() -> bool:
        supervisor.receive()
        assert supervisor.watch(time.monotonic()) is None
        return supervisor.ready is not None

    def is_done() -> bool:
        steps = [report for report in supervisor.receive() if isinstance(report, StepDone)]
        tokens.extend(token for done in steps for output in done.outputs for token in output.token_ids)
        return len(tokens) == NUM_TOKENS

    wait_until(is_ready, "the engine is ready")
    supervisor.send(COMMAND)
    wait_until(is_done, "the job is done")
    return tokens


def end_of(supervisor: Supervisor) -> EngineExit:
    exits: list[EngineExit] = []

    def has_ended() -> bool:
        supervisor.receive()
        exit_ = supervisor.watch(time.monotonic())
        exits.extend([exit_] if exit_ else [])
        return bool(exits)

    wait_until(has_ended, "the engine has ended")
    return exits[0]


def engine_of(supervisor: Supervisor) -> psutil.Process:
    assert supervisor.ready is not None
    return psutil.Process(supervisor.ready.pid)
