"""The judge `llm-comply`, which checks answers against the specifications of three APIs. What it finds wrong must be
what docs/clients.md explains, and the other way round.

It sends no limit, so it takes a model that ends by itself, and its timeout is for a silence, not for an answer: a model
that never ends keeps it waiting for a whole context.
"""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from tests.conformance.programs import report

MODEL = "by-hand"

ANTHROPIC = ("--auth-header", "x-api-key", "--no-bearer", "-H", "anthropic-version:2023-06-01")

TEXTS = {"anth-basic-response", "anth-system-prompt", "anth-multi-turn"}  # `citations` is required, if only as null

#: The tools need a grammar, which the fake engine has no vocabulary for.
EXPECTED = {
    "open-responses": {"image-input", "tool-calling", "error-handling", "compact-missing-model"},
    "openai-chat": {"chat-image-input", "chat-tool-calling", "chat-error-handling"},
    "anthropic": {"anth-image-input", "anth-tool-calling", *TEXTS},
}


def judge(api: str, *options: str) -> None:
    command = [str(Path(sys.executable).parent / "llm-comply"), "--json", "--format", api, "--model", MODEL, *options]
    command += ["--base-url", os.environ["OPENAI_BASE_URL"], "--api-key", os.environ["OPENAI_API_KEY"]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    results = json.loads(done.stdout)["results"]
    assert len(results) >= 9, "it has tried all its cases"
    failed = {result["id"]: result["errors"] for result in results if result["status"] == "failed"}
    assert failed.keys() == EXPECTED[api], failed


def open_responses() -> None:
    judge("open-responses")


def openai_chat() -> None:
    judge("openai-chat")


def anthropic_messages() -> None:
    judge("anthropic", *ANTHROPIC)


report.run([open_responses, openai_chat, anthropic_messages], version=version("llm-comply"))
