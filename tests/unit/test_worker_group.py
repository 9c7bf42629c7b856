"""`celeriac worker --gpus` and the workers of `celeriac up`: for which GPUs and models there is one."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

from celeriac import worker_group
from celeriac.up import autostarted, first_job_model
from celeriac.worker_group import WorkerGroup, chosen_gpus, numbered
from local.gpus import Gpu, visible_gpus
from settings import Settings

ANSWER = "0, GPU-aaaa1111, 81559\n1, GPU-bbbb2222, 81559\n2, GPU-cccc3333, 40960\n"
MODELS = "".join(
    f'[[models]]\nid = "{name}"\npath = "none"\nbackend = "fake"\n{more}\n'
    for name, more in (("a", ""), ("b", "autostart = true"), ("c/d", "autostart = true"), ("e", ""))
)


@pytest.fixture
def three_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    answered = subprocess.CompletedProcess([], 0, stdout=ANSWER)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: answered)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize(
    ("visible", "ids"),
    [
        (None, ["0", "1", "2"]),
        ("2,0", ["2", "0"]),
        ("GPU-bbbb", ["1"]),
        ("1,7,0", ["1"]),  # as in CUDA, the first unknown one hides the rest
        ("", []),
        ("-1", []),
    ],
)
def test_the_gpus_are_those_that_cuda_would_show(
    three_gpus: None, monkeypatch: pytest.MonkeyPatch, visible: str | None, ids: list[str]
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [gpu.id for gpu in visible_gpus()] == ids


def test_their_memory_is_told_in_bytes(three_gpus: None) -> None:
    assert [gpu.total_bytes // 2**20 for gpu in visible_gpus()] == [81559, 81559, 40960]


def test_all_or_some_can_be_chosen_and_unknown_ones_are_refused(three_gpus: None) -> None:
    assert [gpu.id for gpu in chosen_gpus("all")] == ["0", "1", "2"]
    assert [gpu.id for gpu in chosen_gpus("2, 0,2")] == ["2", "0"]
    with pytest.raises(click.ClickException, match="'5', but the GPUs here are: 0, 1, 2"):
        chosen_gpus("0,5")


def test_without_a_gpu_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_group, "visible_gpus", lambda: [])
    with pytest.raises(click.ClickException, match=r"no GPU .* install NVIDIA's driver"):
        chosen_gpus("all")


def test_node_names_stay_unique() -> None:
    assert numbered("gpu-1@here", "3") == "gpu-1-gpu3@here"
    assert numbered("gpu-1", "0") == "gpu-1-gpu0"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """The environments of the workers that a group starts: instead of them, a script that the test chooses."""
    environments: list[dict[str, str]] = []
    really_start = subprocess.Popen

    def start(command: list[str], *, env: dict[str, str], **options: Any) -> "subprocess.Popen[bytes]":
        environments.append(env)
        script = f"import sys, time; time.sleep({3600 if env['CUDA_VISIBLE_DEVICES'] == '1' else 0}); sys.exit(3)"
        return really_start([sys.executable, "-c", script], env=env, **options)

    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    return environments


def test_each_worker_sees_one_gpu_and_they_end_together(started: list[dict[str, str]]) -> None:
    """The first fails at once; the second would run for an hour, and is told to end."""
    group = WorkerGroup(Settings(worker_name="w"), [Gpu("0", 1), Gpu("1", 1)])
    assert group.run() == 3
    seen = [(env["CUDA_VISIBLE_DEVICES"], env["CUDA_DEVICE_ORDER"], env["CELERIAC_WORKER_NAME"]) for env in started]
    assert seen == [("0", "PCI_BUS_ID", "w-gpu0"), ("1", "PCI_BUS_ID", "w-gpu1")]


@pytest.fixture
def models_file(tmp_path: Path) -> Path:
    path = tmp_path / "models.toml"
    path.write_text(MODELS)
    return path


def test_up_starts_a_worker_for_each_model_that_says_so_besides_the_first(models_file: Path, tmp_path: Path) -> None:
    assert autostarted(Settings(models_file=models_file, data_dir=tmp_path)) == ["b", "c/d"]
    assert autostarted(Settings(models_file=models_file, data_dir=tmp_path, default_model="b")) == ["c/d"]
    assert autostarted(Settings(models_file=models_file, data_dir=tmp_path, worker_model="e")) == []


def test_the_first_job_goes_to_a_model_that_is_served(models_file: Path, tmp_path: Path) -> None:
    def model_with(**settings: Any) -> str:
        return first_job_model(Settings(models_file=models_file, data_dir=tmp_path, **settings))

    assert model_with() == "a"
    assert model_with(worker_model="e") == "e"
    assert model_with(worker_model="e,a") == "a"
    assert model_with(default_model="b") == "b"
