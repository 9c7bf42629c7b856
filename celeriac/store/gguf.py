"""Describes or converts a GGUF file.

What needs torch or transformers runs in a child process, since only the engine's package may import them.
"""

import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from celeriac.store.files import ModelRefused
from celeriac.store.gguf_description import write_description, write_tokenizer
from celeriac.store.gguf_tokenizer import UnknownVocabulary
from local.lifetime import ending_with_us
from settings import ROOT

PROGRAM = "gpu_worker.engine.gguf_conversion"
PACKAGES = ("torch", "transformers", "gguf", "accelerate")


def refuse_without_packages(file_name: str) -> None:
    """Raises ModelRefused if a package that a conversion needs is missing."""
    if missing := _missing_packages():
        raise ModelRefused(
            f"converting {file_name} needs {', '.join(missing)}; install the extra `worker`, pull it for llama.cpp "
            "(--backend llama_cpp), or pull the model's safetensors"
        )


def describe(file: Path, folder: Path) -> None:
    """Write config and tokenizer of `file` into `folder`, for an engine that runs the file itself. transformers is
    asked about vocabularies that are not known here. Raises ModelRefused."""
    try:
        write_description(file, folder)
    except UnknownVocabulary as exc:
        if missing := _missing_packages():
            raise ModelRefused(
                f"{file.name}: {exc}, which only transformers may know; that needs {', '.join(missing)}: install the "
                "extra `worker`"
            ) from exc
        _run("describe", file, folder, failure="its description could not be read")
    except ValueError as exc:
        raise ModelRefused(f"{file.name}: its description could not be read: {exc}") from exc


def convert(file: Path, folder: Path) -> None:
    """Write weights, config and tokenizer of `file` into `folder`; the tokenizer is the one that llama.cpp would get.
    Raises ModelRefused."""
    _run("convert", file, folder, failure="it could not be converted to safetensors")
    with suppress(ValueError):  # of a vocabulary that only transformers knows
        write_tokenizer(file, folder)


def _missing_packages() -> list[str]:
    return [package for package in PACKAGES if find_spec(package) is None]


def _run(verb: str, file: Path, folder: Path, *, failure: str) -> None:
    command = [sys.executable, "-m", PROGRAM, verb, str(file), str(folder)]
    environment = os.environ | {"TQDM_DISABLE": "1"}
    with tempfile.TemporaryFile("w+") as said:
        done = subprocess.run(ending_with_us(command), cwd=ROOT, env=environment, stdout=said, stderr=said, check=False)
        said.seek(0)
        lines = said.read().strip().splitlines() or ["it printed nothing"]
    if done.returncode != 0:
        raise ModelRefused(f"{file.name}: {failure}: {lines[-1]}")
