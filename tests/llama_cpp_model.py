"""celeriac-mini as a GGUF file, and the environment with llama.cpp, for tests that need them.

`celeriac engines install llama_cpp` creates it in the data directory; LLAMA_CPP_ENVIRONMENT names another one.
"""

import os
import shutil
import sys
from pathlib import Path

import pytest

from settings import ROOT, get_settings

MINI = ROOT / "models" / "celeriac-mini"


def environment() -> Path:
    """The environment's folder. Skips the test if there is none for this Python version."""
    named = os.environ.get("LLAMA_CPP_ENVIRONMENT")
    folder = Path(named) if named else get_settings().data_dir.absolute() / "engines" / "llama_cpp"
    if not (_packages(folder) / "llama_cpp").is_dir():
        pytest.skip("llama.cpp is not installed; `celeriac engines install llama_cpp` compiles it")
    return folder


def python() -> str:
    return str(environment() / "bin" / "python")


def make_importable() -> None:
    """Make llama.cpp importable in this process. Packages that our own environment has, too, still come from there."""
    packages = str(_packages(environment()))
    if packages not in sys.path:
        sys.path.append(packages)
    pytest.importorskip("gguf", reason="gguf, which writes the test's model, is not installed")


def write_mini(folder: Path) -> Path:
    """Write the model's unchanged weights in float32, with its tokenizer beside them."""
    from transformers import AutoModelForCausalLM

    from bench.gguf_weights import write_gguf

    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MINI / name, folder)
    write_gguf(AutoModelForCausalLM.from_pretrained(MINI).float(), folder / "mini.gguf")
    return folder


def _packages(folder: Path) -> Path:
    return folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
