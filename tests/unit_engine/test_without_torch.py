"""tests/unit runs where there is no torch: `make test-fast`."""

import subprocess
import sys

import pytest

from settings import ROOT

pytestmark = pytest.mark.slow


def test_the_fast_tests_load_neither_torch_nor_transformers() -> None:
    command = [sys.executable, "-m", "pytest", "-p", "tests.without_torch", "--collect-only", "-q", "tests/unit"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
