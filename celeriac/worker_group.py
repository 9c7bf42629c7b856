"""`celeriac worker --gpus`: one worker per GPU, started together and ended together."""

import os
import signal
import subprocess
import sys
import time
from types import FrameType

import click

from local.gpus import Gpu, visible_gpus
from local.lifetime import ending_with_us
from settings import PREFIX, Settings

LOOK_SECONDS = 0.2


def run_workers(settings: Settings, wanted: str) -> int:
    """Run a worker on each of the GPUs that `wanted` names (`all`, or their numbers), until all have ended. Returns the
    exit code: 0, or that of the first worker that failed, after which the others drain and end as well. Raises
    ClickException."""
    return WorkerGroup(settings, chosen_gpus(wanted)).run()


def chosen_gpus(wanted: str) -> list[Gpu]:
    """Raises ClickException if there is no such GPU."""
    gpus = {gpu.id: gpu for gpu in visible_gpus()}
    if not gpus:
        raise click.ClickException(
            f"--gpus is {wanted!r}, but nvidia-smi reports no GPU that this process may use; install NVIDIA's driver, "
            "check CUDA_VISIBLE_DEVICES, or leave --gpus out"
        )
    names = list(gpus) if wanted == "all" else list(dict.fromkeys(name.strip() for name in wanted.split(",")))
    for name in names:
        if name not in gpus:
            raise click.ClickException(f"--gpus names {name!r}, but the GPUs here are: {', '.join(gpus)}")
    return [gpus[name] for name in names]


class WorkerGroup:
    """The worker processes of one command. Each gets its own session, so that Ctrl-C reaches it once, from us."""

    def __init__(self, settings: Settings, gpus: list[Gpu]) -> None:
        self._settings = settings
        self._gpus = gpus
        self._workers: list[subprocess.Popen[bytes]] = []

    def run(self) -> int:
        for signal_number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
            signal.signal(signal_number, self._pass_on)
        self._workers += map(self._start, self._gpus)
        exit_code = 0
        while True:
            is_any_running = any(worker.poll() is None for worker in self._workers)
            failed = [worker.returncode for worker in self._workers if worker.returncode]
            if failed and not exit_code:
                exit_code = failed[0] if failed[0] > 0 else 128 - failed[0]
                click.echo(f"a worker ended with exit code {exit_code}; the others drain and end", err=True)
                self._pass_on(signal.SIGTERM, None)
            if not is_any_running:
                return exit_code
            time.sleep(LOOK_SECONDS)

    def _start(self, gpu: Gpu) -> "subprocess.Popen[bytes]":
        # The order in which nvidia-smi numbers them; CUDA's own begins with the fastest.
        environment = os.environ | {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": gpu.id}
        if self._settings.worker_name is not None:
            environment[f"{PREFIX}WORKER_NAME"] = numbered(self._settings.worker_name, gpu.id)
        command = [sys.executable, "-m", "celeriac", "worker"]
        return subprocess.Popen(
            ending_with_us(command, signal_number=signal.SIGTERM), env=environment, start_new_session=True
        )

    def _pass_on(self, signal_number: int, _: FrameType | None) -> None:
        for worker in self._workers:
            if worker.poll() is None:
                worker.send_signal(signal_number)


def numbered(name: str, gpu: str) -> str:
    """A node name for the worker on this GPU: gpu-1@host becomes gpu-1-gpu0@host."""
    first, at, host = name.partition("@")
    return f"{first}-gpu{gpu}{at}{host}"
