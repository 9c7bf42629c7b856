"""SmolLM2 in vLLM, in its own environment: its text is that of `generate`, whatever is killed."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from celeriac.client import Client
from celeriac.store.store import ModelStore
from tests import vllm_model
from tests.chaos.plant import Plant, start_prepared
from tests.integration.test_main_job import System
from tests.real_models.conftest import CHAT, SETTINGS, Reference
from tests.real_models.kills import FREE, PROMPT, UNDER_A_SCHEMA, WORDS, submit, text_of, text_through_kills

pytestmark = pytest.mark.slow

MODEL = f"{CHAT}-vllm"
NUM_TOKENS = 24


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


@pytest.mark.parametrize("params", [FREE, UNDER_A_SCHEMA], ids=["free", "under a schema"])
def test_an_engine_killed_three_times_in_mid_stream_changes_nothing(
    vllm_client: Client, vllm_system: System, params: dict[str, Any]
) -> None:
    text = text_through_kills(vllm_client, vllm_system, MODEL, params)
    if params is UNDER_A_SCHEMA:
        assert len(json.loads(text)) == WORDS["minItems"]
