"""SmolLM2 in vLLM, in its own environment: its text is that of `generate`, whatever is killed."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from transformers import AutoModelForCausalLM

from celeriac.client import Client
from celeriac.store.store import ModelStore
from tests import vllm_model
from tests.chaos.plant import Plant, start_prepared
from tests.integration.test_main_job import System
from tests.real_models.conftest import CHAT, SETTINGS, Reference
from tests.real_models.kills import DRAWN, FREE, PROMPT, UNDER_A_SCHEMA, WORDS, submit, text_of, text_through_kills
from tests.waiting import wait_until

pytestmark = pytest.mark.slow

MODEL = f"{CHAT}-vllm"
NUM_TOKENS = 24
SPARE_BYTES = 40 * 2**20  # enough for a step of one token, not for the logits of a prompt's 400


@pytest.fixture(scope="module")
def vllm_system(store: ModelStore) -> Iterator[System]:
    models = f"""
[[models]]
id = "{MODEL}"
path = "{store.path(CHAT)}"
backend = "vllm"
python = "{vllm_model.python()}"
max_model_len = 512
max_num_seqs = 4
vllm = {{ enforce_eager = true }}
"""
    folder = Path(tempfile.mkdtemp(prefix="celeriac-vllm-"))
    settings = SETTINGS | {"models_dir": folder / "none"}
    plant = Plant(folder, models=models, worker_models={"cpu": MODEL}, settings=settings, start=start_prepared)
    with System(plant) as system:
        yield system
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def vllm_client(vllm_system: System) -> Iterator[Client]:
    with Client(vllm_system.plant.api_urls[0]) as client:
        yield client


def test_greedy_text_is_that_of_generate(vllm_client: Client, store: ModelStore) -> None:
    text = text_of(vllm_client, submit(vllm_client, MODEL, FREE, NUM_TOKENS))
    with Reference(store.path(CHAT), AutoModelForCausalLM) as reference:
        reference.model.generation_config.eos_token_id = None  # as `ignore_eos` has it
        expected = reference.greedy(reference.tokenizer(PROMPT)["input_ids"], NUM_TOKENS)
        assert text == reference.text(expected)


@pytest.mark.parametrize("params", [FREE, DRAWN, UNDER_A_SCHEMA], ids=["greedy", "drawn", "under a schema"])
def test_an_engine_killed_three_times_in_mid_stream_changes_nothing(
    vllm_client: Client, vllm_system: System, params: dict[str, Any]
) -> None:
    text = text_through_kills(vllm_client, vllm_system, MODEL, params)
    if params is UNDER_A_SCHEMA:
        assert len(json.loads(text)) == WORDS["minItems"]


def test_a_step_that_runs_out_of_memory_costs_its_neighbour_nothing(vllm_client: Client, vllm_system: System) -> None:
    """vLLM's state is lost with the step: the engine ends, and both jobs go on in the next one."""
    undisturbed = text_of(vllm_client, submit(vllm_client, MODEL, FREE))
    neighbour = submit(vllm_client, MODEL, FREE)
    engine = engine_of(vllm_system)
    wait_until(lambda: tokens_of(vllm_client, neighbour) > 0, "its neighbour runs")
    engine.rlimit(psutil.RLIMIT_AS, (engine.memory_info().vms + SPARE_BYTES, psutil.RLIM_INFINITY))
    greedy = vllm_client.submit(PROMPT * 80, model=MODEL, temperature=0, max_tokens=4, prompt_logprobs=1).id
    wait_until(lambda: not engine.is_running(), "the engine has run out of memory")
    assert text_of(vllm_client, neighbour) == undisturbed
    assert vllm_client.wait(greedy).status == "completed"
    assert "can't allocate memory" in vllm_system.plant.workers[0].log()


def test_a_job_waits_for_an_engine_that_dies_while_it_loads(vllm_client: Client, vllm_system: System) -> None:
    undisturbed = text_of(vllm_client, submit(vllm_client, MODEL, FREE, NUM_TOKENS))
    first = engine_of(vllm_system)
    first.kill()
    wait_until(lambda: engine_of(vllm_system).pid != first.pid, "there is another engine")
    job_id = submit(vllm_client, MODEL, FREE, NUM_TOKENS)
    engine_of(vllm_system).kill()
    assert text_of(vllm_client, job_id) == undisturbed
    assert vllm_client.get(job_id).raw["attempt"] == 1, "it was not charged"


def engine_of(system: System) -> psutil.Process:
    return psutil.Process(wait_until(system.plant.workers[0].engine_pid, "there is an engine"))


def tokens_of(client: Client, job_id: str) -> int:
    return int(client.get(job_id).raw["usage"]["completion_tokens"])
