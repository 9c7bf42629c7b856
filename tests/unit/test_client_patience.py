"""How long a client keeps trying while its API is away."""

import time

import httpx
import pytest

from celeriac import celery as celery_tasks
from celeriac.client import ApiUnreachable, Client

URL = "http://127.0.0.1:9"


def goes_away(client: Client, *, num_answers: int) -> list[str]:
    """Have the API answer `num_answers` requests, and no more. Returns the paths asked for."""
    paths: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        paths.append(request.url.path)
        if len(paths) > num_answers:
            raise httpx.ConnectError("[Errno 111] Connection refused")
        return httpx.Response(200, json={"data": [{"id": "fake"}]})

    client._http.close()
    client._http = httpx.Client(base_url=URL, transport=httpx.MockTransport(answer))
    return paths


def test_a_submit_is_repeated_until_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    with Client(URL, patience_seconds=5) as client:
        paths = goes_away(client, num_answers=1)
        client.queues()
        with pytest.raises(ApiUnreachable):
            client.submit("Once")
    assert len(paths) > 3
    assert 5 < now[0] < 10


def test_a_task_never_waits_in_its_slot_for_an_api_that_went_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"slept {seconds} s"))
    monkeypatch.setattr(celery_tasks, "_clients", {})
    monkeypatch.setenv("CELERIAC_API_URL", URL)
    with celery_tasks.client_of(celery_tasks.generate.app) as client:
        goes_away(client, num_answers=1)
        client.queues()
        with pytest.raises(ApiUnreachable):
            client.submit("Once")
