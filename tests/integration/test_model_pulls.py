"""Models are pulled over HTTP: by a real maintenance process, from a server that speaks the Hub's URLs."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session, sessionmaker

from domain.catalog import Catalog
from settings import Settings
from storage import model_pulls
from storage.model_pulls import Progress, PullStatus
from tests.integration.api_harness import ApiServer
from tests.integration.maintenance_harness import MODELS, RunningMaintenance, maintaining
from tests.integration.test_model_sources import Hub, HubRequest
from tests.unit.test_model_store import write_published
from tests.waiting import SECONDS, wait_until

pytestmark = pytest.mark.slow

PULLS = "/v1/admin/models/pulls"


class GatedRequest(HubRequest):
    def do_GET(self) -> None:
        assert isinstance(self.server, GatedHub)
        if self.path.endswith("/model.safetensors"):
            self.server.is_asked.set()
            self.server.gate.wait(SECONDS)
        super().do_GET()


class GatedHub(Hub):
    """Holds the weights back until its gate is opened."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.RequestHandlerClass = GatedRequest
        self.gate, self.is_asked = threading.Event(), threading.Event()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed has closed its connection."""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[GatedHub]:
    with GatedHub(write_published(tmp_path / "published")) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server
        server.gate.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def maintain(
    hub: GatedHub, tmp_path: Path, database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], Any]:
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return lambda: maintaining(tmp_path, database_url, redis_url, data_dir=tmp_path / "data")


@pytest.fixture
def client(tmp_path: Path, database_url: str, redis_url: str) -> Iterator[httpx.Client]:
    (tmp_path / "models.toml").write_text(MODELS)
    settings = Settings(
        database_url=database_url, redis_url=redis_url, models_file=tmp_path / "models.toml", data_dir=tmp_path / "data"
    )
    catalog = Catalog.load(settings.models_file, store=settings.store_dir)
    with ApiServer(settings, catalog) as server, server.client() as client:
        yield client


def ask(client: httpx.Client, **body: Any) -> dict[str, Any]:
    answer = client.post(PULLS, json=body)
    assert answer.status_code == 202, answer.text
    return dict(answer.json())


def wait_for(client: httpx.Client, name: str, status: str) -> dict[str, Any]:
    wait_until(lambda: client.get(f"{PULLS}/{name}").json()["status"] == status, f"{name} is {status}")
    return dict(client.get(f"{PULLS}/{name}").json())


def test_a_pull_goes_on_after_a_restart_and_ends_with_a_served_model(
    client: httpx.Client, hub: GatedHub, maintain: Callable[[], Any]
) -> None:
    assert (ask(client, source="hf:org/tiny@main")["id"], ask(client, source="hf:org/other")["id"]) == ("tiny", "other")
    first: RunningMaintenance
    with maintain() as first:
        wait_until(hub.is_asked.is_set, "the weights are asked for")
        wait_until(lambda: client.get(f"{PULLS}/tiny").json()["total_bytes"], "its size is known")
        assert client.get(f"{PULLS}/other").json()["status"] == "queued", "one at a time"
        assert ask(client, source="hf:org/tiny@main")["status"] == "running", "a repeated request changes nothing"
        first.terminate()
        assert client.get(f"{PULLS}/tiny").json()["status"] == "queued"
    hub.gate.set()
    with maintain():
        done = wait_for(client, "tiny", "completed")
        assert (done["error"], done["source"]) == (None, "hf:org/tiny@main")
        wait_until(lambda: client.get("/v1/models/tiny").status_code == 200, "the API serves it")
        assert "the hub has no such model: hf:org/other" in wait_for(client, "other", "failed")["error"]
        listed = client.get(PULLS).json()["data"]
        assert {pull["id"]: pull["status"] for pull in listed} == {"tiny": "completed", "other": "failed"}
    audit = client.get("/v1/admin/audit").json()["data"]
    assert {"model": "tiny", "source": "hf:org/tiny@main"} in [entry["changes"] for entry in audit]


def test_a_running_pull_is_cancelled_and_leaves_nothing(
    client: httpx.Client, hub: GatedHub, maintain: Callable[[], Any], tmp_path: Path
) -> None:
    ask(client, source="hf:org/tiny@main", name="mine")
    ask(client, source="hf:org/tiny@main", name="waiting")
    assert client.post(f"{PULLS}/waiting/cancel").json()["status"] == "cancelled"
    with maintain():
        wait_until(hub.is_asked.is_set, "the weights are asked for")
        assert client.post(f"{PULLS}/mine/cancel").json()["cancel_requested"]
        assert wait_for(client, "mine", "cancelled")["error"] is None
        assert not (tmp_path / "data" / "models" / "mine").exists()
        assert client.get("/v1/models/mine").status_code == 404
        hub.gate.set()
        assert ask(client, source="hf:org/tiny@main", name="mine")["status"] == "queued", "it can be asked for again"
        wait_for(client, "mine", "completed")


def test_a_pull_asked_for_again_while_it_is_cancelled_begins_anew(session_factory: sessionmaker[Session]) -> None:
    first, second = uuid4(), uuid4()
    with session_factory.begin() as session:
        model_pulls.ask(session, "tiny", "hf:org/tiny", accepts_licence=False)
    with session_factory.begin() as session:
        assert model_pulls.claim(session, first)
        assert model_pulls.cancel(session, "tiny").cancel_requested
    with session_factory.begin() as session:
        pull = model_pulls.ask(session, "tiny", "hf:org/other", accepts_licence=False)
        assert (pull.status, pull.cancel_requested, pull.source) == (PullStatus.QUEUED, False, "hf:org/other")
        assert not model_pulls.report(session, "tiny", first, Progress()), "the first process stops"
        model_pulls.end(session, "tiny", first, PullStatus.CANCELLED)
        assert model_pulls.claim(session, second), "and its end is not this one's"


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"source": "/etc"}, "source", "neither a known model"),
        ({"source": "models/celeriac-mini"}, "source", "on the machine that has it"),
        ({"source": "file:///etc/passwd"}, "source", "hf:owner/name@revision"),
        ({"source": "hf:../../etc/passwd/x@y/../z"}, None, ""),
        ({"source": "gemma3-270m"}, "accept_licence", "Gemma Terms of Use"),
        ({"source": "hf:org/tiny", "name": "../up"}, "name", "is not a model's name"),
        ({"source": "hf:org/tiny", "name": ".partial"}, "name", "is not a model's name"),
        ({"source": ""}, "source", ""),
        ({"source": "hf:org/tiny", "nam": "x"}, "nam", "did you mean name?"),
    ],
)
def test_what_cannot_be_pulled_over_http_is_refused_at_once(
    client: httpx.Client, body: dict[str, Any], param: str | None, says: str
) -> None:
    answer = client.post(PULLS, json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert param is None or error["param"] == param
    assert says in error["message"]
    assert client.get(f"{PULLS}/unknown").status_code == 404


def test_a_name_that_is_being_pulled_from_elsewhere_is_taken(client: httpx.Client) -> None:
    ask(client, source="hf:org/tiny")
    answer = client.post(PULLS, json={"source": "hf:other/tiny"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "name")


def test_the_pull_of_a_dead_process_is_claimed_again_and_one_that_is_cancelled_ends(
    session_factory: sessionmaker[Session],
) -> None:
    dead, other = uuid4(), uuid4()
    with session_factory.begin() as session:
        model_pulls.ask(session, "a", "hf:org/a", accepts_licence=False)
        model_pulls.ask(session, "b", "hf:org/b", accepts_licence=False)
        claimed = model_pulls.claim(session, dead)
        assert claimed is not None
        assert model_pulls.claim(session, other) is None
    with session_factory.begin() as session:
        session.execute(text("UPDATE model_pulls SET seen_at = seen_at - interval '1 minute' WHERE status = 'running'"))
        again = model_pulls.claim(session, other)
        assert again is not None
        assert again.name == claimed.name
        assert not model_pulls.report(session, claimed.name, dead, Progress())
        assert model_pulls.report(session, claimed.name, other, Progress("Storing", 5, 9))
        model_pulls.cancel(session, claimed.name)
        assert not model_pulls.report(session, claimed.name, other, Progress("Storing", 6, 9))
        session.execute(text("UPDATE model_pulls SET seen_at = seen_at - interval '1 minute' WHERE status = 'running'"))
        last = model_pulls.claim(session, other)
        assert last is not None
        assert {last.name, claimed.name} == {"a", "b"}
        assert model_pulls.find(session, claimed.name).status == PullStatus.CANCELLED
