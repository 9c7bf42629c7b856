"""Thousands of requests made from the OpenAPI document, good and bad ones, against the running API: no answer may be
a server error, be undeclared, or look otherwise than declared, and nothing that the document forbids may pass.

`make fuzz` sends more of them.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from api.openapi import document_of
from domain.catalog import Catalog
from gpu_worker import intake
from metrics import Process, registries
from settings import ROOT
from storage import tenants
from storage.tables import DEFAULT_TENANT_ID
from tests.integration.api_harness import ApiServer
from tests.integration.runner_harness import MODEL, Rig

NUM_REQUESTS = int(os.environ.get("FUZZ_REQUESTS", "5000"))
SEED = os.environ.get("FUZZ_SEED", "1")
CONFIG = ROOT / "tests" / "conformance" / "schemathesis.toml"
NUM_SYSTEMATIC = 3800  # requests at least that are made whatever is asked for
LINE = b'{"custom_id":"a","method":"POST","url":"/v1/responses","body":{"model":"test-model","input":"Hi"}}'
CATALOG = f"""
[[models]]
id = "{MODEL}"
path = "none"
backend = "fake"
max_model_len = 64
max_num_seqs = 32
"""


@pytest.fixture
def server(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiServer]:
    """An API that wants keys, and a worker that ends every job at once."""
    monkeypatch.setattr(intake, "POLL_SECONDS", 0.01)
    rig.settings.models_file.write_text(CATALOG)
    settings = rig.settings.model_copy(update={"auth": "api_key"})
    with ApiServer(settings, Catalog.load(rig.settings.models_file)) as server:
        rig.start()
        yield server


def answers_by_status() -> dict[str, int]:
    """So many requests this process has answered by now, with this status."""
    counts: dict[str, int] = {}
    for metric in registries[Process.API].collect():
        for sample in metric.samples:
            if sample.name.endswith("http_requests_total"):
                status = sample.labels["status"]
                counts[status] = counts.get(status, 0) + int(sample.value)
    return counts


@pytest.mark.slow
@pytest.mark.timeout(600 + NUM_REQUESTS / 10)
def test_no_request_made_from_the_document_gets_what_it_does_not_promise(
    server: ApiServer, rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with rig.sessions.begin() as session:
        key = tenants.create_key(session, DEFAULT_TENANT_ID)
    num_operations = sum(map(len, document_of(server.app)["paths"].values()))
    num_examples = max(10, (NUM_REQUESTS - NUM_SYSTEMATIC) // num_operations)
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(CONFIG), "run"]
    command += [f"{server.url}/openapi.json", "--header", f"Authorization: Bearer {key}", "--seed", SEED]
    # Its key is not an administrator's, who could take the key away; test_admin_keys.py tries the routes of these.
    command += ["--exclude-path-regex", "^/v1/admin/", "--max-examples", str(num_examples)]
    monkeypatch.setenv("FUZZ_IDS", json.dumps(make_things(server, key)))
    before = answers_by_status()
    logs = [run_phases(command, phases, tmp_path) for phases in ("coverage", "fuzzing,stateful")]  # one core each
    for process, log in logs:
        assert process.wait() == 0, log.read_text()[-20_000:]
    answers = {status: count - before.get(status, 0) for status, count in answers_by_status().items()}
    print(f"{sum(answers.values())} requests, answered with {answers}")
    assert sum(answers.values()) >= NUM_REQUESTS
    assert not [status for status, count in answers.items() if status.startswith("5") and count]


def make_things(server: ApiServer, key: str) -> dict[str, str]:
    """Ids of what can be read, by the names of their path parameters; the file is one that batches can be made of."""
    say, short = [{"role": "user", "content": "Hi"}], {"max_tokens": 4}
    with server.client(key) as client:
        file = client.post("/v1/files", files={"file": ("a.jsonl", LINE)}, data={"purpose": "batch"}).json()["id"]
        batch = {"input_file_id": file, "endpoint": "/v1/responses", "completion_window": "24h"}
        message = {"custom_id": "a", "params": {"model": MODEL, "messages": say} | short}
        made = {
            "job_id": client.post("/v1/jobs", json={"model": MODEL, "prompt": "Hi", "params": short}),
            "completion_id": client.post(
                "/v1/chat/completions", json={"model": MODEL, "messages": say, "store": True} | short
            ),
            "response_id": client.post("/v1/responses", json={"model": MODEL, "input": "Hi", "max_output_tokens": 4}),
            "batch_id": client.post("/v1/batches", json=batch),
            "message_batch_id": client.post("/v1/messages/batches", json={"requests": [message]}),
            "conversation_id": client.post("/v1/conversations", json={"items": [say[0] | {"id": "msg_1"}]}),
        }
    return {name: answer.json()["id"] for name, answer in made.items()} | {"file_id": file, "item_id": "msg_1"}


def run_phases(command: list[str], phases: str, folder: Path) -> tuple["subprocess.Popen[bytes]", Path]:
    """A process that has been started, and what it will have written."""
    path = folder / f"{phases}.log"
    with path.open("wb") as log:
        process = subprocess.Popen([*command, "--phases", phases], cwd=folder, stdout=log, stderr=log)
    return process, path
