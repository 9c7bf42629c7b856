"""Under the path of a proxy: every link that clients get has it, whether or not the proxy cuts it off."""

from collections.abc import Iterator

import httpx
import pytest
from pydantic import ValidationError
from websockets.sync.client import connect

from settings import Settings
from tests.integration.api_harness import ApiServer, HandWorker, body

ROOT_PATH = "/tools/celeriac"


@pytest.fixture
def behind(api_settings: Settings) -> Iterator[httpx.Client]:
    settings = api_settings.model_copy(update={"root_path": ROOT_PATH})
    with ApiServer(settings) as server, server.client() as client:
        yield client


def test_links_have_the_path_of_the_proxy(behind: httpx.Client, hand_worker: HandWorker) -> None:
    made = behind.post(f"{ROOT_PATH}/v1/jobs", json=body())
    location = made.headers["location"]
    assert location == f"{ROOT_PATH}/v1/jobs/{made.json()['id']}"
    assert behind.get(location).json()["id"] == made.json()["id"]
    job = hand_worker.claim(made.json()["id"])
    hand_worker.say(job, "done")
    hand_worker.finish(job, "done")
    url = behind.post(f"{location}/stream_token").json()["url"]
    assert url.startswith(f"{location}/events?token=")
    assert "job.completed" in behind.get(url).text
    cancelled = behind.post(f"{ROOT_PATH}/v1/jobs", json=body()).headers["location"]
    behind.post(f"{cancelled}/cancel")
    assert behind.post(f"{cancelled}/retry").headers["location"].startswith(f"{ROOT_PATH}/v1/jobs/job_")

    links = behind.get("/").json()["links"]
    assert links["jobs"] == f"{ROOT_PATH}/v1/jobs"
    assert {behind.get(link).status_code for link in links.values()} == {200}
    assert behind.get("/openapi.json").json()["servers"] == [{"url": ROOT_PATH}]


def test_pages_and_sockets_are_found_with_the_path_and_without(behind: httpx.Client) -> None:
    for path in ("/", "/docs", "/openapi.json", "/static/dashboard/app.js", "/health/live", "/v1/queue"):
        with_it = behind.get(f"{ROOT_PATH}{path}", headers={"accept": "text/html"})
        without = behind.get(path, headers={"accept": "text/html"})
        assert (with_it.status_code, without.status_code) == (200, 200), path
    redirect = behind.get(f"{ROOT_PATH}?a=b")
    assert (redirect.status_code, redirect.headers["location"]) == (308, f"{ROOT_PATH}/?a=b")
    assert behind.post(ROOT_PATH).status_code == 404
    assert behind.get(f"{ROOT_PATH}er/v1/queue").status_code == 404
    assert behind.get(f"{ROOT_PATH}{ROOT_PATH}/v1/queue").status_code == 404
    for path in ("", ROOT_PATH):
        with connect(f"{str(behind.base_url).replace('http', 'ws', 1)}{path}/v1/responses") as socket:
            socket.send("{}")
            assert "error" in str(socket.recv(timeout=60))


@pytest.mark.parametrize("root_path", ["celeriac", "/celeriac/", "/", "/a b", "//evil.example", "/a?b", "https://a/b"])
def test_what_is_no_path_is_refused(root_path: str) -> None:
    with pytest.raises(ValidationError, match="root_path"):
        Settings(root_path=root_path)
