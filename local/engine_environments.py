"""Separate Python environments for engines, so that their pinned versions cannot conflict with each other or ours.

Each is a folder in `engines` of the data directory. This file needs only the standard library, since engines import it
before they know which packages they have.
"""

import os
import platform
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

#: What every engine imports, whatever its back end. These have no large dependencies and work with any torch.
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
DEVICES_SECONDS = 60.0  # for listing an environment's devices

#: Devices that NVIDIA's driver creates, on Linux and in WSL.
GPU_DEVICES = (Path("/dev/nvidiactl"), Path("/dev/dxg"))


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to create the environment of a back end: a table of engines.toml."""

    backend: str
    title: str
    package: str
    version: str
    devices: str
    build_arguments: str = ""
    machine_arguments: dict[str, str] = field(default_factory=dict)  # more of them, by what platform.machine() says
    chooses_versions: bool = False
    unwanted: tuple[str, ...] = ()

    @property
    def cmake_arguments(self) -> str:
        """Those of CMAKE_ARGS come last, so that they prevail."""
        here = self.machine_arguments.get(platform.machine(), "")
        return " ".join(filter(None, [self.build_arguments, here, os.environ.get("CMAKE_ARGS", "")]))


@dataclass(frozen=True, slots=True)
class Installed:
    version: str
    devices: str  # or why it cannot be started


def engine_python(named: str | None, backend: str, data_dir: Path) -> str:
    """The interpreter of a model's engine: the one that its entry names, else that of the environment installed for its
    back end, else ours. A named interpreter may not exist."""
    if named is not None:
        return named
    return str(_python_in(environment_folder(data_dir, backend))) if is_installed(backend, data_dir) else sys.executable


def is_installed(backend: str, data_dir: Path) -> bool:
    return _python_in(environment_folder(data_dir, backend)).exists()


def missing_interpreter(python: str) -> str:
    """The message for an entry whose interpreter cannot be run."""
    return (
        f"python is {python!r}, which cannot be run here; correct it, or remove it and run `celeriac engines install`"
    )


def environment_folder(data_dir: Path, backend: str) -> Path:
    return data_dir.absolute() / "engines" / backend


def recipes() -> dict[str, Recipe]:
    """By back end."""
    tables = tomllib.loads(RECIPES_FILE.read_text(encoding="utf-8"))
    has_gpu = any(device.exists() for device in GPU_DEVICES)
    for table in tables.values():
        without_gpu = table.pop("without_gpu", {})
        if not has_gpu:
            table |= without_gpu
    return {backend: Recipe(backend, **table) for backend, table in tables.items()}


def install(recipe: Recipe, data_dir: Path) -> Path:
    """Create or recreate the environment, and return its interpreter. pip reports its progress on stdout and stderr.

    It is made in a folder of its own, where it stays, since scripts in its `bin` name its interpreter. `put_in_place`
    links to that folder once it is complete. Raises subprocess.CalledProcessError.
    """
    place = environment_folder(data_dir, recipe.backend)
    folder = place.with_name(f".{recipe.backend}.{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [str(_python_in(folder)), "-m", "pip"]
    versions = [] if recipe.chooses_versions else ["--constraint", str(CONSTRAINTS_FILE)]
    command = [*pip, "install", *versions, *LIGHT_PACKAGES, f"{recipe.package}=={recipe.version}"]
    subprocess.run(command, env=os.environ | {"CMAKE_ARGS": recipe.cmake_arguments}, check=True)
    if recipe.unwanted:
        subprocess.run([*pip, "uninstall", "--yes", *recipe.unwanted], check=True)
    put_in_place(folder, place)
    return _python_in(place)


def put_in_place(folder: Path, place: Path) -> None:
    """Make `place` a link to the finished environment in `folder`, beside it, and remove all others, including those
    that were never finished."""
    link = place.with_name(f".{place.name}.link")
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name)
    if not place.is_symlink():
        shutil.rmtree(place, ignore_errors=True)  # of an earlier release, which put the environment itself here
    link.replace(place)
    for other in place.parent.glob(f".{place.name}.*"):
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)


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
    last_line = (asked.stderr.strip().splitlines() or ["it gives no reason"])[-1]
    return Installed(version, asked.stdout.strip() if asked.returncode == 0 else f"cannot be started: {last_line}")


def _python_in(folder: Path) -> Path:
    return folder / "bin" / "python"


def _versions(folder: Path, package: str) -> Iterator[str]:
    stem = package.replace("-", "_")
    for place in folder.glob(f"lib/python*/site-packages/{stem}-*.dist-info"):
        yield place.name.removeprefix(f"{stem}-").removesuffix(".dist-info")
