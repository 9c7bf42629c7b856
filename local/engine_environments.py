"""Environments of their own for engines, so that the pins of one never meet those of another or ours.

Each lies in the folder engines of the data directory. The standard library alone, since engines import this file before
they know what else they have.
"""

import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

#: What every engine imports, whatever its back end; they need nothing that is large, and agree with any torch.
LIGHT_PACKAGES = (
    "llguidance",
    "msgspec",
    "numpy",
    "orjson",
    "prometheus-client",
    "pydantic",
    "pydantic-settings",
    "python-json-logger",
    "tokenizers",
)

RECIPES_FILE = Path(__file__).with_name("engines.toml")
CONSTRAINTS_FILE = RECIPES_FILE.parents[1] / "constraints.txt"
DEVICES_SECONDS = 60.0  # in which an environment says what it has


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the environment of a back end is made: a table of engines.toml."""

    backend: str
    title: str
    package: str
    version: str
    build_arguments: str
    devices: str


@dataclass(frozen=True, slots=True)
class Installed:
    version: str
    devices: str  # or why it cannot be started


def engine_python(named: str | None, backend: str, data_dir: Path) -> str:
    """The interpreter of a model's engine: the one that its entry names, else that of the environment installed for its
    back end, else ours. One that is named need not exist."""
    if named is not None:
        return named
    installed = _python_in(environment_folder(data_dir, backend))
    return str(installed) if installed.exists() else sys.executable


def missing_interpreter(python: str) -> str:
    """What is wrong with an entry, and what to do."""
    return (
        f"python is {python!r}, which cannot be run here; correct it, or take it out and run `celeriac engines install`"
    )


def environment_folder(data_dir: Path, backend: str) -> Path:
    return data_dir.absolute() / "engines" / backend


def recipes() -> dict[str, Recipe]:
    """By back end."""
    tables = tomllib.loads(RECIPES_FILE.read_text(encoding="utf-8"))
    return {backend: Recipe(backend, **table) for backend, table in tables.items()}


def install(recipe: Recipe, data_dir: Path) -> Path:
    """Make the environment, or make it anew; pip says on stdout and stderr how far it is. Returns its interpreter.

    It is made beside its place and moved there when it is whole. Raises subprocess.CalledProcessError.
    """
    folder = environment_folder(data_dir, recipe.backend)
    new = folder.with_name(f".{recipe.backend}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-m", "venv", new], check=True)
    arguments = f"{recipe.build_arguments} {os.environ.get('CMAKE_ARGS', '')}".strip()
    command = [str(_python_in(new)), "-m", "pip", "install", "--constraint", str(CONSTRAINTS_FILE), *LIGHT_PACKAGES]
    command.append(f"{recipe.package}=={recipe.version}")
    subprocess.run(command, env=os.environ | {"CMAKE_ARGS": arguments}, check=True)
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)
    return _python_in(folder)


def installed(recipe: Recipe, data_dir: Path) -> Installed | None:
    folder = environment_folder(data_dir, recipe.backend)
    version = next(_versions(folder, recipe.package), None)
    if version is None:
        return None
    asked = subprocess.run(
        [_python_in(folder), "-c", recipe.devices],
        capture_output=True,
        text=True,
        timeout=DEVICES_SECONDS,
        check=False,
    )
    last_line = (asked.stderr.strip().splitlines() or ["it does not say why"])[-1]
    return Installed(version, asked.stdout.strip() if asked.returncode == 0 else f"cannot be started: {last_line}")


def _python_in(folder: Path) -> Path:
    return folder / "bin" / "python"


def _versions(folder: Path, package: str) -> Iterator[str]:
    stem = package.replace("-", "_")
    for place in folder.glob(f"lib/python*/site-packages/{stem}-*.dist-info"):
        yield place.name.removeprefix(f"{stem}-").removesuffix(".dist-info")
