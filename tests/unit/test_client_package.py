"""The wheel: the client and its commands work where nothing else of this tree is installed."""

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from celeriac.client.protocol import JOB_FIELDS
from dialects.native import EmbeddingJobBody, JobBody
from settings import ROOT


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the wheel holds."""
    folder = tmp_path_factory.mktemp("site")
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    for package in packages:
        place = folder / package.replace(".", "/")
        place.mkdir()
        for file in (ROOT / package.replace(".", "/")).glob("*.py"):
            shutil.copy(file, place)
    return folder


def run(installed: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Without the tree, which an editable installation adds to the path."""
    without = f"import sys; sys.path[:] = [path for path in sys.path if path not in ('', {str(ROOT)!r})]; "
    begin = f"sys.path.insert(0, {str(installed)!r}); sys.argv[0] = 'celeriac'; "
    environment = {"PATH": "/usr/bin:/bin"}
    return subprocess.run(
        [sys.executable, "-c", without + begin + code, *arguments],
        capture_output=True,
        text=True,
        cwd=installed,
        env=environment,
        check=False,
    )


CLI = "from celeriac.cli import main; main()"


def test_the_client_needs_nothing_of_the_server(installed: Path) -> None:
    code = "import celeriac.client; print(*sorted(name.partition('.')[0] for name in sys.modules))"
    done = run(installed, code)
    assert done.returncode == 0, done.stderr
    ours = {path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()} - {"celeriac"}
    loaded = set(done.stdout.split())
    assert "domain" in ours
    assert not loaded & (ours | {"settings", "pydantic", "celery", "fastapi"})


def test_only_the_commands_of_the_client_are_offered(installed: Path) -> None:
    shown = run(installed, CLI, "--help").stdout
    assert "submit" in shown
    assert "migrate" not in shown
    assert "celeriac up" not in shown
    assert "export CELERIAC_API_URL=" in shown
    refused = run(installed, CLI, "migrate")
    assert refused.returncode == 1
    assert refused.stderr == (
        "Error: `celeriac migrate` needs the server, but only the client is installed here; run it in a checkout, "
        "where make run installs it\n"
    )


def test_of_models_only_the_pulls_over_http_are_offered(installed: Path) -> None:
    asked = run(installed, CLI, "models", "pulls", "--url", "http://127.0.0.1:9")
    assert asked.stderr.startswith("Error: no answer from the API at http://127.0.0.1:9: Connection refused")
    assert "`celeriac models pull` needs the server" in run(installed, CLI, "models", "pull", "x").stderr
    assert "`celeriac models list` needs the server" in run(installed, CLI, "models").stderr
    shown = run(installed, CLI, "models", "--help").stdout.partition("Commands:")[2]
    assert shown.split()[0] == "pulls"
    assert "check" not in shown


def test_its_commands_name_the_api_and_the_remedy(installed: Path) -> None:
    assert "CELERIAC_API_URL" in run(installed, CLI, "submit", "Hello!").stderr
    for command in ("jobs", "bench"):
        refused = run(installed, CLI, command, "--url", "http://127.0.0.1:9")
        assert refused.returncode == 1
        assert refused.stderr.startswith("Error: no answer from the API at http://127.0.0.1:9: Connection refused")


def test_a_refused_key_is_explained(installed: Path) -> None:
    code = "from celeriac.client.errors import ApiError; from celeriac.terminal import explain; "
    done = run(installed, code + "print(explain(ApiError(401, {'error': {'message': 'not valid'}})))")
    assert done.stdout == "not valid [401]: export CELERIAC_API_KEY=the key that you were given\n", done.stderr


def test_submit_sends_every_field_of_a_job_as_one() -> None:
    fields = (JobBody.model_fields.keys() | EmbeddingJobBody.model_fields.keys()) - {"params", "idempotency_key"}
    assert fields == JOB_FIELDS
