"""What the queue's modules drag in: neither the API nor the worker's main process may load an engine."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("module", ["maintenance.janitor", "gpu_worker.app"])
def test_no_torch_outside_the_engine_process(module: str) -> None:
    script = f"import sys, {module}; sys.exit(bool({{'torch', 'transformers'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0
