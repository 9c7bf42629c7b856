"""A request without a model is for the installation's default, which the answer names."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from celeriac.client import Client
from domain.catalog import Catalog
from domain.jobs import parse_id
from gpu_worker import intake
from tests.integration.api_harness import ApiServer
from tests.integration.runner_harness import MODEL, Rig

HELLO = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def served(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiServer]:
    monkeypatch.setattr(intake, "POLL_SECONDS", 0.01)
    with ApiServer(rig.settings, Catalog.load(rig.settings.models_file)) as server:
        rig.start()
        yield server


def test_every_route_takes_the_default_model_and_says_so(served: ApiServer, rig: Rig) -> None:
    bodies: dict[str, dict[str, object]] = {
        "/v1/chat/completions": {"messages": HELLO, "max_tokens": 3},
        "/v1/completions": {"prompt": "Hi", "max_tokens": 3, "model": None},
        "/v1/responses": {"input": "Hi", "max_output_tokens": 3},
        "/v1/embeddings": {"input": "Hi"},
        "/v1/jobs": {"prompt": "Hi", "params": {"max_tokens": 3}},
    }
    with served.client() as http:
        for path, body in bodies.items():
            answer = http.post(path, json=body)
            assert answer.status_code in (200, 202), (path, answer.text)
            assert answer.json()["model"] == MODEL, path
        for path in ("/generate", "/chat", "/api/v1/infer"):
            answer = http.post(path, json={"prompt": "Hi", "max_tokens": 3, "bad_words": ["ba"]})
            assert answer.status_code == 200, (path, answer.text)
            assert rig.job(parse_id(answer.headers["x-job-id"])).model == MODEL
        assert http.post("/v1/jobs", json={"inputs": ["Hi"]}).json()["model"] == MODEL
        assert http.post("/v1/messages", json={"messages": HELLO, "max_tokens": 3}).status_code == 400
    with Client(served.url) as client:
        assert client.submit("Hi", max_tokens=3).model == MODEL


def test_a_default_that_is_unavailable_is_refused_with_its_reason(rig: Rig, tmp_path: Path) -> None:
    file = tmp_path / "broken.toml"
    file.write_text('[[models]]\nid = "first"\n' + rig.settings.models_file.read_text())
    with ApiServer(rig.settings, Catalog.load(file)) as server, server.client() as http:
        refused: httpx.Response = http.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 3})
    assert refused.status_code == 503
    assert "path is missing" in refused.json()["error"]["message"]
    assert refused.json()["error"]["param"] == "model"
