"""What processes drag in: only the engine's may load an engine, and only the API's the API's routes."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("module", ["maintenance.process", "gpu_worker.app"])
def test_a_process_loads_neither_engines_nor_routes_of_others(module: str) -> None:
    script = f"import sys, {module}; print({{'torch', 'transformers', 'api.app'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
