"""Describes or converts a GGUF file in a child process, since only the engine's package may import torch."""

import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from celeriac.store.files import ModelRefused
from local.lifetime import ending_with_us
from settings import ROOT

PROGRAM = "gpu_worker.engine.gguf_conversion"
PACKAGES = ("torch", "transformers", "gguf", "accelerate")


def refuse_without_packages(file_name: str) -> None:
    """Raises ModelRefused if a package that `describe` or `convert` needs is missing."""
    missing = [package for package in PACKAGES if find_spec(package) is None]
    if missing:
        raise ModelRefused(
            f"reading {file_name} needs {', '.join(missing)}; install the extra `worker`, or pull the model's "
            "safetensors"
        )


def describe(file: Path, folder: Path) -> None:
    """Write config and tokenizer of `file` into `folder`, for an engine that runs the file itself. Raises
    ModelRefused."""
    _run("describe", file, folder, failure="its description could not be read")


def convert(file: Path, folder: Path) -> None:
    """Write weights, config and tokenizer of `file` into `folder`. Raises ModelRefused."""
    _run("convert", file, folder, failure="it could not be converted to safetensors")


def _run(verb: str, file: Path, folder: Path, *, failure: str) -> None:
    command = [sys.executable, "-m", PROGRAM, verb, str(file), str(folder)]
    environment = os.environ | {"TQDM_DISABLE": "1"}
    with tempfile.TemporaryFile("w+") as said:
        done = subprocess.run(ending_with_us(command), cwd=ROOT, env=environment, stdout=said, stderr=said, check=False)
        said.seek(0)
        lines = said.read().strip().splitlines() or ["it printed nothing"]
    if done.returncode != 0:
        raise ModelRefused(f"{file.name}: {failure}: {lines[-1]}")
