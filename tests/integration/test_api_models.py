"""Models over HTTP: one that is unavailable says why on every route, models.toml is followed, and a text that its model
cannot read is refused at the door."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy.orm import Session, sessionmaker

from domain.catalog import Catalog
from maintenance.janitor import Janitor
from settings import Settings
from storage import workers
from storage.workers import WorkerReport
from tests.integration.api_harness import ApiServer, HandWorker, body, post_job
from tests.unit.test_models import beyond_the_vocabulary
from tests.waiting import wait_until

FAKE = '[[models]]\nid = "{}"\npath = "fake"\nbackend = "fake"\nmax_model_len = 64\n'
BAD = '[[models]]\nid = "bad"\npath = "/nowhere"\n'


@pytest.fixture
def models_file(tmp_path: Path) -> Path:
    file = tmp_path / "models.toml"
    file.write_text(FAKE.format("fake") + BAD)
    return file


@pytest.fixture
def http(api_settings: Settings, models_file: Path) -> Iterator[httpx.Client]:
    with ApiServer(api_settings, Catalog.load(models_file)) as server, server.client() as client:
        yield client


def post_everywhere(http: httpx.Client, model: str, text: str) -> dict[str, httpx.Response]:
    """Every route that takes a text, with it."""
    message = [{"role": "user", "content": text}]
    bodies: dict[str, dict[str, Any]] = {
        "/v1/jobs": {"prompt": text},
        "/v1/completions": {"prompt": text, "max_tokens": 1},
        "/v1/chat/completions": {"messages": message},
        "/v1/responses": {"input": text},
        "/v1/responses/input_tokens": {"input": text},
        "/v1/embeddings": {"input": text},
    }
    return {path: http.post(path, json={"model": model} | content) for path, content in bodies.items()}


def test_a_model_that_is_unavailable_says_why_on_every_route(http: httpx.Client) -> None:
    for path, answer in post_everywhere(http, "bad", "hello").items():
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (503, "model_unavailable"), path
        assert "not a folder on this machine" in error["message"]
        assert int(answer.headers["retry-after"]) >= 1
    served, bad = http.get("/v1/models").json()["data"]
    assert (served["id"], served["unavailable"], served["max_model_len"], served["task"]) == (
        "fake",
        None,
        64,
        "generation",
    )
    assert (bad["id"], bad["loaded"], bad["max_model_len"], bad["task"]) == ("bad", False, None, None)
    assert "not a folder on this machine" in bad["unavailable"]
    assert http.get("/v1/models/bad").json()["unavailable"] == bad["unavailable"]
    health = http.get("/health").json()
    assert (health["status"], health["models"], health["models_unavailable"]) == ("degraded", ["fake"], ["bad"])
    post_job(http)


def test_changes_of_models_toml_are_followed_without_a_restart(http: httpx.Client, models_file: Path) -> None:
    job = post_job(http)
    models_file.write_text(FAKE.format("other"))
    wait_until(lambda: http.post("/v1/jobs", json=body(model="other")).status_code == 202)
    wait_until(lambda: http.post("/v1/jobs", json=body()).status_code == 404)
    assert [model["id"] for model in http.get("/v1/models").json()["data"]] == ["other"]
    assert http.get(f"/v1/jobs/{job['id']}").json()["status"] == "queued", "it is there still"
    models_file.write_text("[[models")
    models_file.write_text(FAKE.format("other") + FAKE.format("third"))
    wait_until(lambda: http.post("/v1/jobs", json=body(model="third")).status_code == 202)


def test_jobs_of_a_model_taken_out_go_on_as_long_as_its_workers(
    http: httpx.Client,
    models_file: Path,
    session_factory: sessionmaker[Session],
    hand_worker: HandWorker,
    api_settings: Settings,
) -> None:
    report = WorkerReport(hand_worker.owner, "w1", "fake", max_num_seqs=4, num_running=0, tokens_per_second=1.0)
    with session_factory.begin() as session:
        workers.heartbeat(session, report)
    job = post_job(http)
    models_file.write_text(FAKE.format("other"))
    wait_until(lambda: http.get("/v1/models/fake").status_code == 404)
    hand_worker.redis.flushdb()  # whatever the API sent is lost
    with session_factory.begin() as session:
        workers.heartbeat(session, report)
    janitor = Janitor(session_factory, hand_worker.redis, Catalog.load(models_file), api_settings)
    janitor.tick()
    janitor.tick()
    assert hand_worker.redis.llen("celeriac.fake") == 1, "it was sent to the worker that there is"
    assert hand_worker.claim(job["id"])


def test_a_text_that_spells_a_token_beyond_the_vocabulary_is_a_400_on_every_route(
    api_settings: Settings, tmp_path: Path
) -> None:
    view = beyond_the_vocabulary(tmp_path / "tiny", max_model_len=256, special_tokens_in_content=True)
    with ApiServer(api_settings, Catalog([view.spec])) as server, server.client() as http:
        for path, answer in post_everywhere(http, "tiny", "a <image_soft_token>").items():
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (400, "invalid_value"), path
            assert "<image_soft_token>" in error["message"]
            assert error["param"] in ("prompt", "messages", "input", "input.0"), path


class TestAdapters:
    """`base:adapter` on every route, with a back end that has adapters by name."""

    @pytest.fixture
    def http(self, api_settings: Settings, tmp_path: Path) -> Iterator[httpx.Client]:
        file = tmp_path / "models.toml"
        file.write_text(FAKE.format("fake") + 'adapters = { poems = "poems", prose = "prose" }\n')
        with ApiServer(api_settings, Catalog.load(file)) as server, server.client() as client:
            yield client

    def test_they_are_listed_with_their_model(self, http: httpx.Client) -> None:
        models = http.get("/v1/models").json()["data"]
        assert {model["id"]: model["parent"] for model in models} == {
            "fake": None,
            "fake:poems": "fake",
            "fake:prose": "fake",
        }
        card = http.get("/v1/models/fake:poems").json()
        assert (card["id"], card["parent"], card["max_model_len"]) == ("fake:poems", "fake", 64)

    def test_an_unknown_one_is_a_404_that_names_those_there_are(self, http: httpx.Client) -> None:
        answers = post_everywhere(http, "fake:verse", "hello") | {"card": http.get("/v1/models/fake:verse")}
        for path, answer in answers.items():
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (404, "model_not_found"), path
            assert error["message"].endswith("choose one of: fake, fake:poems, fake:prose")

    def test_its_jobs_go_to_the_models_queue_and_keep_its_name(
        self, http: httpx.Client, hand_worker: HandWorker
    ) -> None:
        job = post_job(http, model="fake:poems")
        assert job["model"] == "fake:poems"
        other = post_job(http, model="fake:prose")
        claimed = hand_worker.claim(job["id"])
        assert (claimed.request.model_id, claimed.request.adapter) == ("fake", "poems")
        assert http.get(f"/v1/jobs/{job['id']}").json()["model"] == "fake:poems"
        for name, ids in (("fake", {job["id"], other["id"]}), ("fake:poems", {job["id"]}), ("fake:verse", set())):
            assert {one["id"] for one in http.get("/v1/jobs", params={"model": name}).json()["data"]} == ids
        assert list(http.get("/health").json()["models"]) == ["fake"]

    def test_it_makes_no_embeddings(self, http: httpx.Client) -> None:
        answer = http.post("/v1/embeddings", json={"model": "fake:poems", "input": "hello"})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model")
        assert "does not make embeddings; use model 'fake'" in answer.json()["error"]["message"]
