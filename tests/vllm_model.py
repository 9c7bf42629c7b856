"""The environment with vLLM, for tests that need it.

`celeriac engines install vllm` creates it in the data directory; VLLM_ENVIRONMENT names another one.
"""

import os
from pathlib import Path

import pytest

from domain.catalog import ModelSpec
from settings import get_settings
from tests.backend_process import BackendProcess


def python() -> str:
    """The environment's interpreter. Skips the test if there is none."""
    named = os.environ.get("VLLM_ENVIRONMENT")
    folder = Path(named) if named else get_settings().data_dir.absolute() / "engines" / "vllm"
    if not any(folder.glob("lib/python*/site-packages/vllm")):
        pytest.skip("vLLM is not installed; `celeriac engines install vllm` does that")
    return str(folder / "bin" / "python")


def running(spec: ModelSpec) -> BackendProcess:
    """To be used as a context."""
    return BackendProcess(spec, python=python(), environment={"OMP_NUM_THREADS": "1"})
