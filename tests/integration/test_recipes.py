"""The programs of docs/recipes.md that need nothing but what Celeriac needs itself."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import pytest
import uvicorn

from storage import job_queries
from storage.tables import DEFAULT_TENANT_ID
from tests.integration.api_harness import MODEL, ApiServer, HandWorker
from tests.recipes import program
from tests.waiting import wait_until


@contextmanager
def serving(app: Any) -> Iterator[str]:
    """An application under a server of its own; its URL."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, ws="none", timeout_graceful_shutdown=5))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            wait_until(lambda: server.started or not thread.is_alive())
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture
def running(api: ApiServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], httpx.Client]]:
    """Runs the program under a heading of docs/recipes.md as a server, before this test's API."""
    monkeypatch.setenv("CELERIAC_API_URL", api.url)
    monkeypatch.delenv("CELERIAC_API_KEY", raising=False)
    with ExitStack() as stack:

        def run(heading: str) -> httpx.Client:
            names: dict[str, Any] = {"__name__": "recipe"}
            exec(compile(program(heading, "python"), heading, "exec"), names)
            url = stack.enter_context(serving(names["app"]))
            return stack.enter_context(httpx.Client(base_url=url, timeout=60))

        yield run


def newest_job(worker: HandWorker) -> str:
    with worker.sessions() as session:
        [job] = job_queries.list_jobs(session, DEFAULT_TENANT_ID, limit=1)
    return str(job.id)


def first_lines(response: httpx.Response, number: int) -> list[str]:
    """The first lines that are not empty. The rest stays unread: the tab is closed."""
    lines = (line for line in response.iter_lines() if line)
    return [next(lines) for _ in range(number)]


def test_an_app_streams_to_its_own_users(running: Any, http: httpx.Client, hand_worker: HandWorker) -> None:
    app = running("A FastAPI app that streams to its own users")
    ada = {"x-user": "ada"}
    job_id = app.post("/stories", json={"prompt": "Once"}, headers=ada).json()["id"]
    events, stop = f"/stories/{job_id}/events", f"/stories/{job_id}/stop"
    job = hand_worker.claim(job_id)
    hand_worker.say(job, "a", " b\n")
    with app.stream("GET", events, headers=ada) as response:
        assert first_lines(response, 4) == ["id: 1", 'data: "a"', "id: 2", 'data: " b\\n"']
    hand_worker.say(job, "c", first=3)
    hand_worker.finish(job, "a", " b\n", "c")
    rest = app.get(events, headers=ada | {"last-event-id": "2"})
    assert rest.text == 'id: 3\ndata: "c"\n\nid: 4\nevent: end\ndata: "completed"\n\n'
    assert [
        app.request(*asked, headers={"x-user": "eve"}).status_code for asked in (("GET", events), ("POST", stop))
    ] == [
        404,
        404,
    ]
    other = app.post("/stories", json={"prompt": "Twice"}, headers=ada).json()["id"]
    assert app.post(f"/stories/{other}/stop", headers=ada).json() == {"status": "cancelled"}


def ui_parts(lines: list[str]) -> list[Any]:
    assert all(line.startswith("data: ") for line in lines)
    return [json.loads(line.removeprefix("data: ")) for line in lines if line != "data: [DONE]"]


def test_a_chat_of_the_ai_sdk_is_resumed_and_stopped(running: Any, http: httpx.Client, hand_worker: HandWorker) -> None:
    """What `DefaultChatTransport` sends, and the UI message stream that it expects."""
    app = running("Vercel AI SDK: `useChat` with resume")
    asked = {
        "id": "chat-1",
        "messages": [{"id": "m1", "role": "user", "parts": [{"type": "text", "text": "Hi"}]}],
        "trigger": "submit-message",
    }
    assert app.get("/api/chat/chat-1/stream").status_code == 204
    with app.stream("POST", "/api/chat", json=asked) as response:
        assert response.headers["x-vercel-ai-ui-message-stream"] == "v1"
        [start] = ui_parts(first_lines(response, 1))
        job_id = start["messageId"]
        job = hand_worker.claim(job_id)
        hand_worker.say(job, "a")
    with app.stream("GET", "/api/chat/chat-1/stream") as response:
        begun = ui_parts(first_lines(response, 3))
        assert [part["type"] for part in begun] == ["start", "text-start", "text-delta"]
        hand_worker.say(job, "b", first=2)
        hand_worker.finish(job, "a", "b")
    assert http.get(f"/v1/jobs/{job_id}").json()["output"]["text"] == "ab", "who leaves stops nothing"
    assert app.get("/api/chat/chat-1/stream").status_code == 204
    with app.stream("POST", "/api/chat", json=asked) as response:
        lines = response.iter_lines()
        second = ui_parts([next(lines)])[0]["messageId"]
        assert second != job_id
        hand_worker.say(hand_worker.claim(second), "c")
        assert app.post("/api/chat/chat-1/stop").json()["status"] == "in_progress"
        assert http.get(f"/v1/jobs/{second}").json()["cancel_requested"]


def test_open_webui_is_answered(http: httpx.Client, hand_worker: HandWorker) -> None:
    """A chat, and the question for its title, as backend/open_webui/routers/openai.py sends them on."""
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    chat = {"model": MODEL, "messages": messages, "stream": True, "stream_options": {"include_usage": True}}
    chat |= {"temperature": 0.7, "top_p": 0.9, "max_tokens": 16, "stop": ["END"], "seed": 3}
    assert MODEL in [model["id"] for model in http.get("/v1/models").json()["data"]]
    with http.stream("POST", "/v1/chat/completions", json=chat) as response:
        assert response.status_code == 200, response.read()
        hand_worker.run(response.headers["x-job-id"], "Hello")
        frames = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {")]
    assert "".join(choice["delta"].get("content") or "" for frame in frames for choice in frame["choices"]) == "Hello"
    assert frames[-1]["usage"]["total_tokens"] > 0
