"""celeriac-mini for llama.cpp, and the environment with llama.cpp, for the tests that find one.

`celeriac engines install llama_cpp` makes it in the data directory; LLAMA_CPP_ENVIRONMENT names another.
"""

import os
import shutil
import sys
from pathlib import Path

import pytest

from settings import ROOT, get_settings

MINI = ROOT / "models" / "celeriac-mini"


def environment() -> Path:
    """Skips the test where there is none of this Python's version."""
    named = os.environ.get("LLAMA_CPP_ENVIRONMENT")
    folder = Path(named) if named else get_settings().data_dir.absolute() / "engines" / "llama_cpp"
    if not (_packages(folder) / "llama_cpp").is_dir():
        pytest.skip("llama.cpp is not installed; `celeriac engines install llama_cpp` compiles it")
    return folder


def python() -> str:
    return str(environment() / "bin" / "python")


def make_importable() -> None:
    """For back ends that are tested within this process. Packages that are here, too, stay ours."""
    packages = str(_packages(environment()))
    if packages not in sys.path:
        sys.path.append(packages)
    pytest.importorskip("gguf", reason="gguf, which writes the test's model, is not installed")


def write_mini(folder: Path) -> Path:
    """Its weights as they are, in float32, with its tokenizer beside them."""
    from transformers import AutoModelForCausalLM

    from bench.gguf_weights import write_gguf

    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MINI / name, folder)
    write_gguf(AutoModelForCausalLM.from_pretrained(MINI).float(), folder / "mini.gguf")
    return folder


def _packages(folder: Path) -> Path:
    return folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
