"""The client at a URL where something else answers: a proxy's page, another server, or half of an answer."""

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from celeriac.client import ApiError, ApiUnreachable, AsyncClient, Client, ClientError, JobSnapshot, UnexpectedAnswer

HTML, JSON, EVENTS = "text/html", "application/json", "text/event-stream"
PAGE = b"<html><h1>Maintenance</h1></html>"
JOB = {"id": "job_1", "status": "completed", "model": "m"}
Answer = tuple[int, dict[str, str], bytes]


def answer(status: int, kind: str, body: Any, **headers: str) -> Answer:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return status, {"content-type": kind, "content-length": str(len(content))} | headers, content


@contextmanager
def serving(*answers: Answer) -> Iterator[str]:
    """The URL of a server that gives these answers, and then the last one again and again."""
    left = list(answers)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("content-length") or 0))
            status, headers, content = left.pop(0) if len(left) > 1 else left[0]
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_DELETE = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


CALLS: dict[str, Callable[[Any], Any]] = {
    "submit": lambda client: client.submit("Once"),
    "get": lambda client: client.get("job_1"),
    "jobs": lambda client: client.jobs(),
    "dead letters": lambda client: client.dead_letters(),
    "models": lambda client: client.model_statuses(),
    "queues": lambda client: client.queues(),
    "usage": lambda client: client.usage(),
    "batch": lambda client: client.batch_results("batch_1", Path("/dev/null")),
}

STRANGE: dict[str, tuple[Answer, str]] = {
    "a page": (answer(200, HTML, PAGE), "200 with text/html instead of JSON"),
    "nothing": (answer(200, JSON, b""), "200 with application/json instead of JSON"),
    "half an answer": (answer(200, JSON, b'{"id": "job'), "instead of JSON"),
    "a list": (answer(200, JSON, [JOB]), "no JSON object"),
    "null": (answer(200, JSON, None), "no JSON object"),
    "too deep": (answer(200, JSON, b"[" * 100_000 + b"]" * 100_000), "instead of JSON|no JSON object"),
    "a redirect": (answer(308, HTML, b"", location="https://example.org/"), "redirects to https://example.org/"),
    "a redirect to nowhere": (answer(302, HTML, PAGE), "302, a redirect that does not say where to"),
}


@pytest.mark.parametrize("name", STRANGE)
def test_what_is_no_answer_of_this_api_is_said_at_once(name: str) -> None:
    strange, said = STRANGE[name]
    with serving(strange) as url:
        for call in CALLS.values():
            with Client(url) as client, pytest.raises(UnexpectedAnswer, match=said) as caught:
                call(client)
            assert str(caught.value).startswith(url)
            assert "check the URL" in str(caught.value)
        with Client(url) as client, pytest.raises(UnexpectedAnswer, match=said):
            client.health()

        async def ask_all() -> None:
            for call in CALLS.values():
                async with AsyncClient(url) as client:
                    with pytest.raises(UnexpectedAnswer, match=said):
                        await call(client)

        asyncio.run(ask_all())


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "text `id`"),
        ({"id": 5, "status": "queued", "model": "m"}, "text `id`"),
        ({"id": "x", "status": None, "model": "m"}, "text `status`"),
        ({"id": "x", "status": "queued"}, "text `model`"),
        (JOB | {"output": "hello"}, "`output`"),
        (JOB | {"output": {"choices": "hello"}}, "list `choices`"),
        (JOB | {"output": {"choices": [{}]}}, "text `text`"),
        (JOB | {"error": "it broke"}, "`error`"),
        (JOB | {"metadata": [1]}, "`metadata`"),
    ],
)
def test_a_job_of_another_server_is_not_taken_for_ours(body: dict[str, Any], said: str) -> None:
    with serving(answer(200, JSON, body)) as url, Client(url) as client, pytest.raises(UnexpectedAnswer, match=said):
        client.submit("Once")


@pytest.mark.parametrize("call", ["jobs", "models", "queues", "batch"])
@pytest.mark.parametrize("body", [{}, {"data": 5}, {"data": ["x"]}, {"data": [], "has_more": True, "id": []}])
def test_a_list_of_another_server_is_not_taken_for_ours(call: str, body: dict[str, Any]) -> None:
    with serving(answer(200, JSON, body)) as url, Client(url) as client:
        if body.get("data") == [] and call in ("models", "queues"):
            assert CALLS[call](client) == []
            return
        with pytest.raises(UnexpectedAnswer):
            CALLS[call](client)


@pytest.mark.parametrize(
    ("status", "body", "headers"),
    [(502, PAGE, {}), (404, b"", {}), (500, b'{"error": "no"}', {}), (429, b"[1]", {"retry-after": "nan"})],
)
def test_a_refusal_in_another_way_names_the_status(status: int, body: bytes, headers: dict[str, str]) -> None:
    with serving(answer(status, HTML, body, **headers)) as url, Client(url, patience_seconds=0) as client:
        with pytest.raises(ApiError, match=f"{status}.*check the URL") as caught:
            client.submit("Once")
        assert caught.value.retry_after_seconds is None


@pytest.mark.parametrize(
    ("strange", "said"),
    [
        (answer(200, HTML, PAGE), "instead of events"),
        (answer(302, HTML, b"", location="/login"), "redirects to /login"),
        (answer(200, EVENTS, b"data: [DONE]\n\n"), "no JSON"),
        (answer(200, EVENTS, b"data: 5\n\n"), "no JSON object"),
    ],
)
def test_a_stream_that_is_none_of_ours_is_said(strange: Answer, said: str) -> None:
    with serving(strange) as url:
        with Client(url, patience_seconds=0) as client, pytest.raises(UnexpectedAnswer, match=said):
            list(client.stream("job_1"))

        async def follow() -> None:
            async with AsyncClient(url, patience_seconds=0) as client:
                with pytest.raises(UnexpectedAnswer, match=said):
                    async for _ in client.stream("job_1"):
                        pass

        asyncio.run(follow())


def test_a_cut_stream_goes_on_after_the_last_whole_event() -> None:
    begun = b'id: 1\nevent: output.delta\ndata: {"index": 0, "text": "a"}\n\nid: 2\nevent: output.delta\ndata: {"ind'
    ended = b"id: 3\nevent: job.completed\ndata: {}\n\n"
    with serving(answer(200, EVENTS, begun), answer(200, EVENTS, ended)) as url, Client(url) as client:
        events = list(client.stream("job_1"))
    assert [(event.id, event.text) for event in events] == [("1", "a"), ("3", "")]


def test_an_event_without_the_fields_of_ours_has_no_text() -> None:
    foreign = answer(200, EVENTS, b"event: output.delta\ndata: {}\n\nevent: job.failed\ndata: {}\n\n")
    with serving(foreign) as url, Client(url) as client:
        assert [event.text for event in client.stream("job_1")] == ["", ""]


def test_a_page_in_the_midst_of_a_wait_is_waited_out() -> None:
    running = answer(200, JSON, JOB | {"status": "in_progress"})
    with serving(running, answer(200, HTML, PAGE), answer(200, JSON, JOB)) as url, Client(url) as client:
        assert client.wait("job_1").has_ended


def test_a_proxy_that_finds_no_api_for_a_moment_loses_no_job() -> None:
    with serving(answer(502, HTML, PAGE), answer(202, JSON, JOB)) as url, Client(url) as client:
        assert client.submit("Once").id == "job_1"
    full = answer(503, JSON, {"error": {"code": "queue_full", "message": "try later"}})
    left_to_the_caller = pytest.raises(ApiError, match="queue_full")
    with serving(full, answer(202, JSON, JOB)) as url, Client(url) as client, left_to_the_caller:
        client.submit("Once")


def test_answers_that_are_cut_off_are_written_once(tmp_path: Path) -> None:
    batch = answer(200, JSON, {"id": "batch_1", "status": "completed", "output_file_id": "file_1"})
    status, headers, content = answer(200, JSON, b"one\ntwo\n")
    with serving(batch, (status, headers, content[:5]), (status, headers, content)) as url, Client(url) as client:
        client.batch_results("batch_1", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == content


def test_a_failed_job_without_a_message_is_raised_as_such() -> None:
    job = JobSnapshot.of(JOB | {"status": "failed", "error": {"code": "x"}})
    with serving(answer(200, JSON, job.raw)) as url, Client(url) as client, pytest.raises(ClientError, match="failed"):
        client.result("job_1")


def test_nothing_at_the_url_is_another_error() -> None:
    with serving(answer(200, JSON, {})) as url:
        pass
    with Client(url) as client, pytest.raises(ApiUnreachable, match="celeriac up") as caught:
        client.get("job_1")
    assert not isinstance(caught.value, UnexpectedAnswer)
