"""An engine in an environment of its own: what it needs there, and what is said where that is missing."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import distribution
from pathlib import Path

import psutil
import pytest

from domain.catalog import LlamaCppOptions, ModelSpec
from gpu_worker.engine.child import missing_package
from gpu_worker.engine_process.frames import AddJob, StepDone
from gpu_worker.engine_process.supervisor import EngineExit, Supervisor
from local.engine_environments import LIGHT_PACKAGES
from tests import llama_cpp_model, vllm_model
from tests.waiting import SECONDS, slowness, wait_until

#: What the light packages need themselves, as far as an engine imports it.
THEIR_NEEDS = ("annotated-types", "pydantic-core", "python-dotenv", "typing-extensions", "typing-inspection")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    return folder


def site_packages(environment: Path) -> Path:
    return next(environment.glob("lib/python*/site-packages"))


@pytest.fixture(scope="module")
def light_python(environment: Path) -> str:
    """With the light packages, by links, and nothing else."""
    for name in (*LIGHT_PACKAGES, *THEIR_NEEDS):
        package = distribution(name)
        tops = {file.parts[0] for file in package.files or () if file.parts[0] not in ("..", "__pycache__")}
        for top in tops:
            link = site_packages(environment) / top
            if not link.exists():
                link.symlink_to(str(package.locate_file(top)))
    return str(environment / "bin" / "python")


@pytest.fixture
def bare_python(tmp_path: Path) -> str:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    return str(tmp_path / "bare" / "bin" / "python")


class Engines:
    """The supervisor of one engine after the other."""

    def __init__(self, spec: ModelSpec) -> None:
        self.supervisor = Supervisor(spec, heartbeat_seconds=5.0)

    def exit(self) -> EngineExit:
        exits: list[EngineExit] = []

        def has_ended() -> bool:
            self.supervisor.receive()
            exit_ = self.supervisor.watch(time.monotonic())
            exits.extend([exit_] if exit_ else [])
            return bool(exits)

        wait_until(has_ended, "the engine has ended")
        return exits[0]

    def start(self, *, seconds: float = SECONDS) -> int:
        """Returns the engine's pid."""

        def is_ready() -> bool:
            self.supervisor.receive()
            exit_ = self.supervisor.watch(time.monotonic())
            assert exit_ is None, exit_
            return self.supervisor.ready is not None

        wait_until(is_ready, "the engine is ready", seconds=seconds)
        assert self.supervisor.ready is not None
        return self.supervisor.ready.pid

    def run(self, committed: Sequence[int] = (), *, num_tokens: int = 10) -> list[int]:
        """The first tokens, if there are more, of a job with ten, after those that are committed."""
        params: dict[str, object] = {"temperature": 0.0, "ignore_eos": True}
        self.supervisor.send(AddJob("job", 1, [40, 41], params, 10, 0, 0, "", [list(committed)], [0], []))
        tokens: list[int] = []

        def is_done() -> bool:
            steps = [report for report in self.supervisor.receive() if isinstance(report, StepDone)]
            tokens.extend(token for done in steps for output in done.outputs for token in output.token_ids)
            return len(tokens) >= num_tokens

        wait_until(is_done, "the tokens are there")
        return tokens


@pytest.fixture
def started() -> Iterator[list[Engines]]:
    started: list[Engines] = []
    yield started
    for engines in started:
        engines.supervisor.stop()


def start(started: list[Engines], python: str) -> Engines:
    return start_engines(started, ModelSpec(id="fake", path="none", backend="fake", max_model_len=64, python=python))


def start_engines(started: list[Engines], spec: ModelSpec) -> Engines:
    started.append(Engines(spec))
    return started[-1]


def test_an_engine_runs_dies_and_comes_back_in_an_environment_with_the_light_packages_alone(
    started: list[Engines], light_python: str
) -> None:
    engines = start(started, light_python)
    pid = engines.start()
    assert Path(os.readlink(f"/proc/{pid}/exe")) == Path(sys.executable).resolve()
    assert light_python in Path(f"/proc/{pid}/cmdline").read_text()
    tokens = engines.run()
    os.kill(pid, signal.SIGKILL)
    assert engines.exit().exit_code == -signal.SIGKILL
    assert engines.start() != pid
    assert engines.run() == tokens


def test_an_interpreter_that_is_missing_is_told_and_not_tried_again(started: list[Engines]) -> None:
    engines = start(started, "/nowhere/bin/python")
    assert engines.exit().why_not_loaded == (
        "python is '/nowhere/bin/python', which cannot be run here; correct it, or remove it and run "
        "`celeriac engines install`"
    )
    assert engines.supervisor.watch(time.monotonic()) is None
    assert not engines.supervisor.has_engine


def test_a_missing_package_is_told_by_name(started: list[Engines], bare_python: str) -> None:
    reason = start(started, bare_python).exit().why_not_loaded
    assert reason is not None
    assert reason.startswith(f"the engine's interpreter {bare_python} has no ")
    assert "docs/engines.md" in reason


def test_an_interpreter_that_dies_during_its_imports_is_not_tried_again(started: list[Engines], tmp_path: Path) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nexit 3\n")
    program.chmod(0o755)
    engines = start(started, str(program))
    reason = engines.exit().why_not_loaded
    assert reason is not None
    assert "exit code 3" in reason
    assert engines.supervisor.watch(time.monotonic()) is None
    assert not engines.supervisor.has_engine


def test_an_import_that_fails_for_another_reason_is_quoted() -> None:
    assert "cannot import: libfoo.so: no such file" in missing_package(ImportError("libfoo.so: no such file"))


def test_a_text_goes_on_after_a_kill_in_llama_cpps_own_environment(started: list[Engines], tmp_path: Path) -> None:
    python = llama_cpp_model.python()
    llama_cpp_model.make_importable()
    spec = ModelSpec(
        id="mini",
        path=str(llama_cpp_model.write_mini(tmp_path)),
        backend="llama_cpp",
        max_model_len=128,
        max_num_seqs=2,
        llama_cpp=LlamaCppOptions(n_threads=1),
        python=python,
    )
    engines = start_engines(started, spec)
    pid = engines.start()
    assert python in Path(f"/proc/{pid}/cmdline").read_text()
    whole = engines.run()
    committed = engines.run(num_tokens=3)
    os.kill(pid, signal.SIGKILL)
    assert engines.exit().exit_code == -signal.SIGKILL
    engines.start()
    committed = committed[:3]
    assert committed + engines.run(committed, num_tokens=7) == whole


def test_a_text_goes_on_after_a_kill_in_vllms_own_environment(
    started: list[Engines], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    spec = ModelSpec(
        id="mini",
        path=str(llama_cpp_model.MINI),
        backend="vllm",
        max_model_len=128,
        max_num_seqs=2,
        vllm={"enforce_eager": True},
        python=vllm_model.python(),
    )
    engines = start_engines(started, spec)
    pid = engines.start()
    whole = engines.run()
    committed = engines.run(num_tokens=3)[:3]
    os.kill(pid, signal.SIGKILL)
    assert engines.exit().exit_code == -signal.SIGKILL
    engines.start()
    assert committed + engines.run(committed, num_tokens=7) == whole


def test_an_engine_that_vllm_splits_leaves_no_process_behind_when_it_is_killed(
    started: list[Engines], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    spec = ModelSpec(
        id="mini",
        path=str(llama_cpp_model.MINI),
        backend="vllm",
        max_model_len=128,
        max_num_seqs=2,
        kv_cache_tokens=1024,
        vllm={"enforce_eager": True, "tensor_parallel_size": 2},
        python=vllm_model.python(),
    )
    engines = start_engines(started, spec)
    pid = engines.start(seconds=300)  # three processes import vLLM
    assert len(engines.run()) == 10
    parts = psutil.Process(pid).children(recursive=True)
    assert len(parts) >= 2
    os.kill(pid, signal.SIGKILL)
    assert engines.exit().exit_code == -signal.SIGKILL
    _, alive = psutil.wait_procs(parts, timeout=30 * slowness())
    assert not alive


def test_an_argument_that_vllm_does_not_have_is_told_by_name(started: list[Engines]) -> None:
    spec = ModelSpec(
        id="mini",
        path=str(llama_cpp_model.MINI),
        backend="vllm",
        max_model_len=128,
        vllm={"enforce_eagr": True},
        python=vllm_model.python(),
    )
    reason = start_engines(started, spec).exit().why_not_loaded
    assert reason == (
        "vllm.enforce_eagr is not an engine argument of the vLLM installed here; did you mean enforce_eager?"
    )


def test_a_file_that_is_no_gguf_is_told_in_llama_cpps_words(started: list[Engines], tmp_path: Path) -> None:
    python = llama_cpp_model.python()
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(llama_cpp_model.MINI / name, tmp_path)
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(100))
    spec = ModelSpec(id="mini", path=str(tmp_path), backend="llama_cpp", max_model_len=128, python=python)
    reason = start_engines(started, spec).exit().why_not_loaded
    assert reason is not None
    assert reason.startswith("llama.cpp cannot load broken.gguf: ")
