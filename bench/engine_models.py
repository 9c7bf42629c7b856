"""SmolLM2-135M as the engines of bench/engines.py need it: pulled once, in several forms."""

import subprocess
from pathlib import Path

from celeriac.store.sources import FolderSource, source_of
from celeriac.store.store import ModelStore, Wanted
from domain.model_sources import known_models

NAME = "smollm2-135m"
QUANTISE = """
import sys
import llama_cpp.llama_cpp as lib
parameters = lib.llama_model_quantize_default_params()
parameters.ftype, parameters.allow_requantize = lib.LLAMA_FTYPE_MOSTLY_Q8_0, True
sys.exit(lib.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), parameters))
"""


class SilentPull:
    def begin(self, what: str, num_bytes: int | None) -> None:
        print(what, flush=True)

    def advance(self, num_bytes: int) -> None:
        pass

    def wait(self, why: str) -> None:
        print(why, flush=True)


class Models:
    """Names that begin with `bench-` are its own."""

    def __init__(self, store: Path, llama_cpp_python: Path) -> None:
        self._store = ModelStore(store)
        self._llama_cpp_python = llama_cpp_python

    def safetensors(self) -> Path:
        """Converted from the four-bit file."""
        known = known_models()[NAME]
        wanted = Wanted(f"bench-{NAME}", source_of(known), num_bytes=known.num_bytes, sha256=known.sha256)
        self._store.pull(wanted, SilentPull())
        return self._store.path(wanted.name)

    def gguf(self, kind: str) -> Path:
        """Q4_1, as it was published, or Q8_0, which is made from it: slower or faster, but no better."""
        [file] = self.safetensors().glob("*.gguf")
        if kind == "Q8_0":
            made = self._store.folder / ".bench-q8_0.gguf"
            if not made.exists():
                subprocess.run([self._llama_cpp_python, "-c", QUANTISE, file, made], check=True, capture_output=True)
            file = made
        wanted = Wanted(f"bench-{NAME}-{kind.lower()}", FolderSource(str(file)), gguf_backend="llama_cpp")
        self._store.pull(wanted, SilentPull())
        return self._store.path(wanted.name)
