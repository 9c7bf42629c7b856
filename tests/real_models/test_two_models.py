"""Two real models on one worker with memory for one: each job has the text that its model writes alone.

Skipped where llama.cpp is not installed (`make test-engines`), and for Gemma where it was not pulled. THOROUGH=1 runs
200 jobs of each pair.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from celeriac.client import Client
from celeriac.store.store import ModelStore
from tests.chaos.plant import Plant, start_prepared
from tests.integration.test_main_job import System
from tests.integration.test_several_models import figure
from tests.real_models.conftest import CHAT, SETTINGS
from tests.real_models.test_llama_cpp import GEMMA, entry, folder
from tests.waiting import wait_until

pytestmark = pytest.mark.slow
__all__ = ["folder"]  # a fixture

ONE = "smollm2-in-llama-cpp"
NUM_JOBS = 200 if os.environ.get("THOROUGH") else 40
BEGINNINGS = (
    "The capital of France is",
    "Once upon a time",
    "Water boils at",
    "My favourite animal is the",
    "In 1969,",
)
NUM_TEXTS = 2 * len(BEGINNINGS)  # greedy, and drawn with a seed
NUM_TOKENS = 12
MAX_DIFFERING = 0.2  # share of the texts of a quantised model, whose logits depend on how many rows a step has
TRANSFORMERS = """
[[models]]
id = "{model_id}"
path = "{folder}"
max_model_len = 256
max_num_seqs = 4
"""


@pytest.fixture(params=["transformers", "llama_cpp"])
def system_and_other(request: pytest.FixtureRequest, store: ModelStore, folder: Path) -> Iterator[tuple[System, str]]:
    """SmolLM2 in llama.cpp beside itself in transformers, or beside Gemma in llama.cpp. Neither pair fits."""
    if request.param == "transformers":
        name, other = CHAT, TRANSFORMERS.format(model_id=CHAT, folder=store.path(CHAT))
    elif any(store.path(GEMMA).glob("*.gguf")) and not any(store.path(GEMMA).glob("*.safetensors")):
        name, other = GEMMA, entry(GEMMA, store.path(GEMMA))
    else:
        pytest.skip(f"{GEMMA} was not pulled for llama.cpp into {store.folder}")
    place = Path(tempfile.mkdtemp(prefix="celeriac-two-"))
    settings = SETTINGS | {
        "models_dir": place / "none",
        "worker_memory": "1300MB",
        "model_residency_seconds": 1.0,
        "lease_seconds": 10,
    }
    models = {"gpu-1": f"{ONE},{name}"}
    plant = Plant(
        place, models=entry(ONE, folder) + other, worker_models=models, settings=settings, start=start_prepared
    )
    with System(plant) as running:
        yield running, name
    shutil.rmtree(place, ignore_errors=True)


def submit(client: Client, model: str, number: int) -> str:
    return client.submit(
        BEGINNINGS[number % len(BEGINNINGS)],
        model=model,
        max_tokens=NUM_TOKENS,
        ignore_eos=True,
        seed=number % NUM_TEXTS,
        temperature=0.7 * (number // len(BEGINNINGS) % 2),
    ).id


def texts_alone(system: System, client: Client, model: str) -> list[set[str]]:
    """Of each number, the texts that the model writes while no other model is asked: one at a time, and several at
    once. In llama.cpp the last bits of a logit depend on how many there are, which decides between tokens that are
    about equally likely."""
    numbers = range(NUM_TEXTS)
    singly = [texts_of(system, client, [submit(client, model, number)])[0] for number in numbers]
    together = texts_of(system, client, [submit(client, model, number) for number in numbers])
    return [{one, other} for one, other in zip(singly, together, strict=True)]


def texts_of(system: System, client: Client, job_ids: list[str]) -> list[str]:
    wait_until(lambda: system.count("status <> 'completed'") == 0, "all jobs are completed", seconds=600)
    return [client.get(job_id).text for job_id in job_ids]


@pytest.mark.timeout(1800)
def test_two_real_models_take_turns_and_each_job_has_the_text_that_its_model_writes_alone(
    system_and_other: tuple[System, str],
) -> None:
    system, other = system_and_other
    [worker] = system.plant.workers
    with Client(system.plant.api_urls[0]) as client:
        alone = {model: texts_alone(system, client, model) for model in (ONE, other)}
        assert alone[ONE] != alone[other]
        before = figure(worker, "celeriac_model_evictions_total")
        told: dict[str, Any] = {"load_percent": set(), "waiting_for": set()}
        wanted = [(ONE, other)[number % 2] for number in range(NUM_JOBS)]
        job_ids = [submit(client, model, number // 2) for number, model in enumerate(wanted)]

        def are_done() -> bool:
            for queue in httpx.get(f"{system.plant.api_urls[0]}/v1/queue").json()["data"]:
                told["load_percent"].add(queue["load_percent"])
            for job_id in job_ids[-2:]:
                place = client.get(job_id).raw.get("queue") or {}
                told["waiting_for"].add(place.get("waiting_for"))
            return system.count("status <> 'completed'") == 0

        wait_until(are_done, "all jobs are completed", seconds=1200)
        texts = [client.get(job_id).text for job_id in job_ids]
    for turn, model in enumerate((ONE, other)):
        asked = list(enumerate(texts[turn::2]))
        differing = [text for number, text in asked if text not in alone[model][number % NUM_TEXTS]]
        assert len(differing) <= (0 if model == CHAT else MAX_DIFFERING) * len(asked), differing
    loads, evictions = (
        figure(worker, f"celeriac_{name}") for name in ("model_load_seconds_count", "model_evictions_total")
    )
    assert evictions > before
    assert loads == evictions + 1
    assert "model_load" in told["waiting_for"], told
    assert system.count("attempt > 1") == 0
    print(f"{loads:g} loads, {told}")
