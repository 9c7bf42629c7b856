"""Thousands of requests made from the OpenAPI document, good and bad ones, against the running API: no answer may be
a server error, be undeclared, or look otherwise than declared, and nothing that the document forbids may pass.

`make fuzz` sends more of them.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
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

NUM_REQUESTS = int(os.environ.get("FUZZ_REQUESTS", "1000"))  # random ones, that is
MAX_SECONDS = os.environ.get("FUZZ_SECONDS", "60")  # for each share of the systematic ones; a slow machine makes fewer
SEED = os.environ.get("FUZZ_SEED", "1")
CONFIG = ROOT / "tests" / "conformance" / "schemathesis.toml"
NUM_SHARES = 5  # of the operations, each tried by a test of its own, so that idle processes take part
MIN_REQUESTS_PER_SHARE = 10  # on the slowest machine
LINE = b'{"custom_id":"a","method":"POST","url":"/v1/responses","body":{"model":"test-model","input":"Hi"}}'
CATALOG = f"""
[[models]]
id = "{MODEL}"
path = "none"
backend = "fake"
max_model_len = 64
max_num_seqs = 32
"""


@dataclass(frozen=True)
class Fuzz:
    """Schemathesis against an API that wants keys, and a worker that ends every job at once."""

    server: ApiServer
    key: str
    folder: Path

    def paths(self) -> list[str]:
        """Those with the largest bodies first. An administrator's are left out, since one could take the key away;
        test_admin_keys.py tries their routes."""
        methods_by_path = document_of(self.server.app)["paths"]

        def num_body_characters(path: str) -> int:
            return len(json.dumps(methods_by_path[path].get("post", {}).get("requestBody")))

        paths = (path for path in methods_by_path if not path.startswith("/v1/admin/"))
        return sorted(paths, key=num_body_characters, reverse=True)

    def run(self, phases: str, *options: str) -> int:
        """Of these phases, and with these options. The number of requests; asserts that no answer was wrong."""
        command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(CONFIG), "run"]
        command += [f"{self.server.url}/openapi.json", "--header", f"Authorization: Bearer {self.key}", "--seed", SEED]
        command += ["--exclude-path-regex", "^/v1/admin/", "--phases", phases, *options]
        before = answers_by_status()
        environment = os.environ | {"FUZZ_IDS": json.dumps(make_things(self.server, self.key))}
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (done.stdout + done.stderr)[-20_000:]
        answers = {status: count - before.get(status, 0) for status, count in answers_by_status().items()}
        print(f"{sum(answers.values())} requests, answered with {answers}")
        assert not [status for status, count in answers.items() if status.startswith("5") and count]
        return sum(answers.values())


@pytest.fixture
def fuzz(rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fuzz]:
    monkeypatch.setattr(intake, "POLL_SECONDS", 0.05)
    rig.settings.models_file.write_text(CATALOG)
    settings = rig.settings.model_copy(update={"auth": "api_key"})
    with rig.sessions.begin() as session:
        key = tenants.create_key(session, DEFAULT_TENANT_ID)
    with ApiServer(settings, Catalog.load(rig.settings.models_file)) as server:
        rig.start()
        yield Fuzz(server, key, tmp_path)


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
@pytest.mark.parametrize("share", range(NUM_SHARES))
def test_no_value_that_the_document_allows_or_forbids_gets_what_it_does_not_promise(fuzz: Fuzz, share: int) -> None:
    """Systematically: each bound of each field, kept and broken, each field left out, each wrong type and method."""
    chosen = [f"--include-path={path}" for path in fuzz.paths()[share::NUM_SHARES]]
    assert fuzz.run("coverage", *chosen, "--max-time", MAX_SECONDS) >= MIN_REQUESTS_PER_SHARE


@pytest.mark.slow
@pytest.mark.timeout(600 + NUM_REQUESTS / 10)
def test_no_request_made_from_the_document_gets_what_it_does_not_promise(fuzz: Fuzz) -> None:
    """At random, and in sequences: what one answer names is asked for by the next request."""
    num_examples = max(5, NUM_REQUESTS // len(fuzz.paths()))
    assert fuzz.run("fuzzing,stateful", "--max-examples", str(num_examples)) >= NUM_REQUESTS / 2


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
