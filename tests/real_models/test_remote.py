"""A remote server as others wrote it, with SmolLM2: vLLM's in every mode, and what a kill of it changes."""

import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from transformers import AutoModelForCausalLM

from celeriac.client import Client
from celeriac.store.store import ModelStore
from local.processes import free_port
from tests import vllm_model
from tests.chaos.plant import Plant, start_prepared
from tests.integration.test_main_job import System
from tests.real_models.conftest import CHAT, SETTINGS, Reference
from tests.real_models.kills import FREE, PROMPT, submit, text_of
from tests.waiting import wait_until

pytestmark = pytest.mark.slow

TOKENS, TEXT, TALK = "by-tokens", "by-text", "by-messages"
NUM_TOKENS, NUM_LONG_TOKENS = 24, 200
NUM_CHUNKS = 3  # that each stream has shown when the server is killed
START_SECONDS = 300.0
MESSAGES = [{"role": "user", "content": "Tell me about the sea."}]
CITY = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"]}
TOOL: Any = {"type": "function", "function": {"name": "find_city", "description": "Finds a city.", "parameters": CITY}}


class VllmServer:
    """vLLM's server on a port that it keeps, whatever is killed."""

    def __init__(self, model: Path, log: Path) -> None:
        self.url = f"http://127.0.0.1:{(port := free_port('127.0.0.1', 0))}"
        # As `vllm serve` does it, whose own start looks for a package named vllm, which the build for CPUs is not.
        self._command = [
            vllm_model.python(),
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            str(model),
            "--served-model-name",
            CHAT,
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
        ]
        self._command += ["--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "4", "--enforce-eager"]
        self._command += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--seed", "0"]
        ours = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        self._environment = os.environ | ours | {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, env=self._environment, stdout=log, stderr=log, start_new_session=True
            )
        wait_until(self._answers, "vLLM's server answers", seconds=START_SECONDS)

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self._log.read_text()[-2000:]
        try:
            return httpx.get(f"{self.url}/v1/models").is_success
        except httpx.HTTPError:
            return False

    def kill(self) -> None:
        """With its engine, which is a process of its own."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


@pytest.fixture(scope="module")
def server(store: ModelStore) -> Iterator[VllmServer]:
    folder = Path(tempfile.mkdtemp(prefix="celeriac-serve-"))
    server = VllmServer(store.path(CHAT), folder / "log")
    try:
        server.start()
        yield server
    finally:
        server.kill()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def front(store: ModelStore, server: VllmServer) -> Iterator[System]:
    entry = f"""
[[models]]
id = "{{}}"
path = "{store.path(CHAT)}"
backend = "remote"
max_model_len = 512
max_num_seqs = 2
remote = {{{{ url = "{server.url}/v1", model = "{CHAT}", metrics_url = "{server.url}/metrics", mode = "{{}}"{{}} }}}}
"""
    takes = ', structured_output = "response_format"'
    models = entry.format(TOKENS, "tokens", "") + entry.format(TEXT, "text", "") + entry.format(TALK, "chat", takes)
    folder = Path(tempfile.mkdtemp(prefix="celeriac-front-"))
    workers = {"front": f"{TOKENS},{TEXT},{TALK}"}
    settings = SETTINGS | {"models_dir": folder / "none"}
    plant = Plant(folder, models=models, worker_models=workers, settings=settings, start=start_prepared)
    with System(plant) as system:
        yield system
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def front_client(front: System) -> Iterator[Client]:
    with Client(front.plant.api_urls[0]) as client:
        yield client


@pytest.fixture
def front_sdk(front: System) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{front.plant.api_urls[0]}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.mark.parametrize("model", [TOKENS, TEXT])
def test_greedy_text_is_that_of_generate(model: str, front_client: Client, store: ModelStore) -> None:
    params = FREE if model == TOKENS else {}  # text has no `ignore_eos`
    text = text_of(front_client, submit(front_client, model, params, NUM_TOKENS))
    with Reference(store.path(CHAT), AutoModelForCausalLM) as reference:
        reference.model.generation_config.eos_token_id = None
        expected = reference.greedy(reference.tokenizer(PROMPT)["input_ids"], NUM_TOKENS)
        assert reference.text(expected).startswith(text)
        assert text


def test_a_conversation_is_what_the_server_says_itself(front_sdk: openai.OpenAI, server: VllmServer) -> None:
    asked: dict[str, Any] = {"messages": MESSAGES, "max_tokens": NUM_TOKENS, "temperature": 0}
    theirs = httpx.post(f"{server.url}/v1/chat/completions", json=asked | {"model": CHAT}, timeout=300).json()
    ours = front_sdk.chat.completions.create(model=TALK, **asked)
    assert ours.choices[0].message.content == theirs["choices"][0]["message"]["content"]
    assert ours.choices[0].finish_reason == theirs["choices"][0]["finish_reason"]


def test_a_tool_is_called_and_a_schema_is_kept(front_sdk: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": TALK, "messages": MESSAGES, "max_tokens": 60, "temperature": 0}
    choice = front_sdk.chat.completions.create(**asked, tools=[TOOL], tool_choice="required").choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls is not None
    (call,) = choice.message.tool_calls
    assert call.type == "function"
    assert call.function.name == "find_city"
    form: Any = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}}
    content = front_sdk.chat.completions.create(**asked, response_format=form).choices[0].message.content
    assert set(json.loads(content or "")) == {"city"}


def test_a_server_that_is_killed_in_mid_stream_changes_no_text(
    front_client: Client, front: System, server: VllmServer
) -> None:
    """In mode tokens the text goes on. A conversation begins anew, and its stream says so."""
    talk = {"messages": MESSAGES, "params": {"max_tokens": NUM_LONG_TOKENS, "temperature": 0}}
    with httpx.Client(base_url=front.plant.api_urls[0], timeout=60) as http:

        def start_both() -> tuple[str, str]:
            talking = http.post("/v1/jobs", json=talk | {"model": TALK}).raise_for_status().json()["id"]
            return submit(front_client, TOKENS, FREE, NUM_LONG_TOKENS), talking

        def num_tokens(job_id: str) -> int:
            usage = http.get(f"/v1/jobs/{job_id}").json()["usage"]  # none before the first output
            return int(usage["completion_tokens"]) if usage else 0

        undisturbed = [text_of(front_client, job_id) for job_id in start_both()]
        going_on, talking = start_both()
        for job_id in (going_on, talking):
            wait_until(lambda: num_tokens(job_id) > NUM_CHUNKS, "it has output")  # noqa: B023
        server.kill()
        assert http.get(f"/v1/jobs/{going_on}").json()["status"] in ("in_progress", "queued")
        server.start()
        for job_id in (going_on, talking):
            wait_until(lambda: http.get(f"/v1/jobs/{job_id}").json()["finished_at"], "it has ended", seconds=300)  # noqa: B023
        assert text_of(front_client, going_on) == undisturbed[0]
        assert http.get(f"/v1/jobs/{talking}").json()["output"]["text"] == undisturbed[1]
        events = http.get(f"/v1/jobs/{talking}/events", headers={"last-event-id": "1"}).text
        assert events.count("event: job.reset") == 1
