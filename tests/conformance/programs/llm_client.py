"""What people do with the command `llm`: a model of its extra-openai-models.yaml. Asserts for itself."""

import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from tests.conformance.programs import report

MODELS = """
- model_id: story
  model_name: test-model
  api_base: {url}
  api_key_name: celeriac
"""
folder = tempfile.TemporaryDirectory()
Path(folder.name, "extra-openai-models.yaml").write_text(MODELS.format(url=os.environ["OPENAI_BASE_URL"]))


def llm(*arguments: str) -> str:
    environment = os.environ | {"LLM_USER_PATH": folder.name}
    command = [str(Path(sys.executable).parent / "llm"), *arguments]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=120).stdout


ASKED = ("-m", "story", "-o", "max_tokens", "8", "--key", os.environ["OPENAI_API_KEY"])


def streamed() -> None:
    assert llm("Hi", *ASKED).strip()


def whole() -> None:
    assert llm("Hi", "--no-stream", *ASKED).strip()


def continued() -> None:
    assert llm("And?", "--continue", *ASKED).strip()


report.run([streamed, whole, continued], version=version("llm"))
