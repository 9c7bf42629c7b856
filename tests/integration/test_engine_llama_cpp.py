"""llama.cpp's back end beyond the contract: its load, a file that is broken, memory that is not there, paused jobs."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import psutil
import pytest

from domain.catalog import ModelSpec
from gpu_worker.engine import load_progress
from gpu_worker.engine.backends import Backend, import_backend
from tests import llama_cpp_model
from tests.integration.test_engine_contract import (
    LLAMA_CPP,
    NUM_SLOTS,
    Transcript,
    hear,
    make_add,
    run,
    run_until,
    step,
)

pytestmark = pytest.mark.slow

NUM_TOKENS = 60


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    llama_cpp_model.make_importable()
    folder = llama_cpp_model.write_mini(tmp_path_factory.mktemp("gguf"))
    return LLAMA_CPP.model_copy(update={"path": str(folder)})


@pytest.fixture(scope="module")
def backend(spec: ModelSpec) -> Backend:
    return load(spec)


def load(spec: ModelSpec) -> Backend:
    return import_backend(spec)(spec)


def test_a_load_tells_how_far_it_has_come(spec: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    shares: list[float] = []
    monkeypatch.setattr(load_progress, "MIN_PAUSE_SECONDS", 0.0)
    load_progress.listen(shares.append)
    load(spec)
    load_progress.listen(lambda share: None)
    assert len(shares) > 2, shares
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_a_job_that_was_paused_goes_on_from_what_is_kept_of_it(backend: Backend) -> None:
    """Although others have run in all places meanwhile. What was computed of it is in a slot beyond theirs."""
    assert backend.loaded.keeps_prefixes
    whole = run(backend, [make_add(max_tokens=NUM_TOKENS, prompt=[50, 51, 52])])["job", 0]
    paused = make_add("paused", max_tokens=NUM_TOKENS, prompt=[50, 51, 52], cache_salt="another tenant")
    said: Transcript = {}
    backend.add(paused)
    run_until(backend, said, ("paused", 0), 20)
    backend.abort("paused", 1, "")
    run(backend, [make_add(f"other-{number}", prompt=[60 + number, 61]) for number in range(NUM_SLOTS)])
    before = said["paused", 0]
    resumed = msgspec.structs.replace(
        paused, attempt=2, committed_token_ids=[before.token_ids], num_emitted_chars=[len(before.text)]
    )
    backend.add(resumed)
    first = step(backend)
    [output] = first.outputs
    assert output.num_cached_tokens >= len(paused.prompt_token_ids) + len(before.token_ids) - 2
    hear(said, first)
    while backend.has_work:
        hear(said, step(backend))
    assert said["paused", 0].token_ids == whole.token_ids
    assert said["paused", 0].text == whole.text


@pytest.mark.parametrize("share", [0.1, 0.5, 0.999])
def test_a_file_that_is_cut_off_is_refused_with_llama_cpps_reason(
    spec: ModelSpec, tmp_path: Path, share: float
) -> None:
    for file in Path(spec.path).iterdir():
        content = file.read_bytes()
        (tmp_path / file.name).write_bytes(content[: int(len(content) * share)] if file.suffix == ".gguf" else content)
    with pytest.raises(ValueError, match=r"llama.cpp cannot load mini.gguf: \w"):
        load(spec.model_copy(update={"path": str(tmp_path)}))


def test_a_cache_that_does_not_fit_into_memory_is_refused_and_a_smaller_one_loads(spec: ModelSpec) -> None:
    with (
        memory_for(2**30),
        pytest.raises(ValueError, match=r"llama\.cpp has no room for 4000000 tokens"),
    ):
        load(spec.model_copy(update={"kv_cache_tokens": 4_000_000}))
    assert run(load(spec), [make_add()])["job", 0].finish_reasons == ["length"]


@contextmanager
def memory_for(num_bytes: int) -> Iterator[None]:
    """Let this process have no more than so many bytes in addition to those it has."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
