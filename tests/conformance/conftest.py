"""The unmodified SDK, over real HTTP, against the real API, whose jobs a real engine on the fake back end runs."""

from collections.abc import Iterator

import openai
import pytest

from domain.catalog import Catalog
from gpu_worker import intake
from tests.conformance.harness import Served
from tests.integration.api_harness import ApiServer
from tests.integration.conftest import api, api_settings, context_length, hand_worker, http, rig
from tests.integration.runner_harness import Rig

__all__ = ["api", "api_settings", "context_length", "hand_worker", "http", "rig"]


@pytest.fixture
def client(api: ApiServer) -> Iterator[openai.OpenAI]:
    """The SDK as it is, against a server whose jobs the test works off by hand."""
    with openai.OpenAI(base_url=f"{api.url}/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture
def served(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """An API and one worker, which looks for jobs by itself."""
    monkeypatch.setattr(intake, "POLL_SECONDS", 0.01)
    settings = rig.settings.model_copy(update={"stream_heartbeat_seconds": 0.2, "disconnect_grace_seconds": 1.0})
    with ApiServer(settings, Catalog.load(rig.settings.models_file)) as server:
        worker = rig.start()
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
            yield Served(server, rig, worker, client)
