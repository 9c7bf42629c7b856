"""An answer reaches its client whatever else goes on: a body that still comes, an old client, a server that ends."""

import asyncio
import http.client
import socket
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from threading import Thread

import httpx
import pytest
import requests

from api.server import GracefulServer
from storage.job_accept import Accepted, NewJob
from tests.integration.api_harness import ApiServer, body, post_job
from tests.waiting import SECONDS, wait_until

TEN_MEGABYTES = b" " * 10_000_000
PIECES = 160
JSON = {"content-type": "application/json"}


def pieces() -> Iterator[bytes]:
    for _ in range(PIECES):
        yield b" " * 65_536


def by_urllib(url: str, headers: dict[str, str]) -> tuple[int, bytes]:
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(urllib.request.Request(url, TEN_MEGABYTES, headers))
    return caught.value.code, caught.value.read()


def by_requests(url: str, headers: dict[str, str]) -> tuple[int, bytes]:
    answer = requests.post(url, data=TEN_MEGABYTES, headers=headers, timeout=60)
    return answer.status_code, answer.content


def by_requests_chunked(url: str, headers: dict[str, str]) -> tuple[int, bytes]:
    answer = requests.post(url, data=pieces(), headers=headers, timeout=60)
    return answer.status_code, answer.content


def by_httpx(url: str, headers: dict[str, str]) -> tuple[int, bytes]:
    answer = httpx.post(url, content=TEN_MEGABYTES, headers=headers, timeout=60)
    return answer.status_code, answer.content


def by_http_client(url: str, headers: dict[str, str], content: object = TEN_MEGABYTES) -> tuple[int, bytes]:
    with closing(http.client.HTTPConnection(url.split("/")[2], timeout=60)) as connection:
        connection.request("POST", "/" + url.split("/", 3)[3], content, headers)  # type: ignore[arg-type]
        answer = connection.getresponse()
        return answer.status, answer.read()


def by_http_client_chunked(url: str, headers: dict[str, str]) -> tuple[int, bytes]:
    return by_http_client(url, headers, pieces())


CLIENTS = [by_urllib, by_requests, by_requests_chunked, by_httpx, by_http_client, by_http_client_chunked]


@pytest.mark.parametrize("send", CLIENTS)
def test_a_refusal_of_ten_megabytes_is_read_by_every_client(
    api: ApiServer, send: Callable[[str, dict[str, str]], tuple[int, bytes]]
) -> None:
    for path, headers, statuses in [
        ("/v1/jobs", {}, {413}),
        ("/v1/jobs", {"connection": "close"}, {413}),
        ("/v1/jobs", {"content-type": "text/plain", "connection": "close"}, {413, 415}),
        ("/v1/files", {"connection": "close"}, {415}),
        ("/nowhere", {"connection": "close"}, {404, 413}),
        ("/v1/queue", {"connection": "close"}, {405, 413}),
    ]:
        for _ in range(2):
            status, content = send(api.url + path, JSON | headers)
            assert status in statuses, path
            assert b'"error"' in content


def test_a_refusal_for_want_of_a_key_is_read(api: ApiServer) -> None:
    api.services.authenticator._is_open = False
    status, _ = by_http_client_chunked(api.url + "/v1/jobs", JSON | {"connection": "close"})
    assert status == 401


def test_a_head_that_is_too_long_is_refused_readably_while_more_comes(api: ApiServer) -> None:
    with closing(socket.create_connection(("127.0.0.1", api.port), timeout=SECONDS)) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\nz: " + b"y" * 2_000_000)
        assert b"".join(iter(lambda: connection.recv(65_536), b"")).startswith(b"HTTP/1.1 431 ")


def test_reading_on_is_bounded_in_bytes(api: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.connections.MAX_DISCARDED_BYTES", 2_000_000)
    with closing(socket.create_connection(("127.0.0.1", api.port), timeout=SECONDS)) as connection:
        connection.sendall(b"POST /v1/jobs HTTP/1.1\r\nhost: localhost\r\ncontent-length: 900000000\r\n\r\n")
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            connection.sendall(b" " * 65_536_000)


@pytest.mark.parametrize("connection_header", [b"", b"connection: close\r\n"])
def test_reading_on_is_bounded_in_time(
    api: ApiServer, monkeypatch: pytest.MonkeyPatch, connection_header: bytes
) -> None:
    monkeypatch.setattr("api.connections.DISCARD_SECONDS", 0.3)
    head = b"POST /v1/jobs HTTP/1.1\r\nhost: localhost\r\n" + connection_header + b"content-length: 9000000\r\n\r\n"
    with closing(socket.create_connection(("127.0.0.1", api.port), timeout=SECONDS)) as connection:
        connection.sendall(head + b"{")
        assert b"".join(iter(lambda: connection.recv(65_536), b"")).startswith(b"HTTP/1.1 413 ")
        wait_until(lambda: not api._server.server_state.connections)


def test_a_connection_goes_on_behind_a_refused_body_that_was_read(api: ApiServer) -> None:
    with closing(http.client.HTTPConnection("127.0.0.1", api.port, timeout=60)) as connection:
        for _ in range(3):
            connection.request("POST", "/v1/jobs", TEN_MEGABYTES, JSON)
            answer = connection.getresponse()
            answer.read()
            assert (answer.status, answer.getheader("connection")) == (413, None)


@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
def test_a_body_that_waits_for_permission_is_refused_without_it(api: ApiServer, version: bytes) -> None:
    head = (
        b"POST /v1/jobs HTTP/"
        + version
        + b"\r\nhost: localhost\r\nexpect: 100-continue\r\ncontent-length: 9000000\r\n\r\n"
    )
    with closing(socket.create_connection(("127.0.0.1", api.port), timeout=SECONDS)) as connection:
        connection.sendall(head + b"content-length: 9000000\r\n\r\n")
        answer = b"".join(iter(lambda: connection.recv(65_536), b""))
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"\r\nconnection: close\r\n" in answer


def test_a_stream_to_an_old_client_is_delimited_by_its_close(api: ApiServer, http: httpx.Client) -> None:
    job = post_job(http)
    http.post(f"/v1/jobs/{job['id']}/cancel")
    with closing(socket.create_connection(("127.0.0.1", api.port), timeout=SECONDS)) as connection:
        connection.sendall(f"GET /v1/jobs/{job['id']}/events HTTP/1.0\r\n\r\n".encode())
        head, _, content = b"".join(iter(lambda: connection.recv(65_536), b"")).partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head.lower()
    assert b"connection: close" in head.lower()
    assert content.startswith(b"retry: ")
    assert content.endswith(b"\n\n")
    assert b"event: job.cancelled" in content


def test_a_whole_answer_to_an_old_client_has_its_length(api: ApiServer) -> None:
    with closing(socket.create_connection(("127.0.0.1", api.port), timeout=SECONDS)) as connection:
        connection.sendall(b"GET /health/live HTTP/1.0\r\n\r\n")
        answer = b"".join(iter(lambda: connection.recv(65_536), b""))
    assert b"content-length: 15\r\n" in answer
    assert answer.endswith(b'{"status":"ok"}')


def test_a_request_that_the_end_of_the_server_cuts_off_is_told_of_its_job(
    api: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the database is slow when an API stops."""
    accepting: list[NewJob] = []

    async def accept(new_job: NewJob) -> Accepted:
        accepting.append(new_job)
        await api.services.draining.wait()
        await asyncio.sleep(60)
        raise AssertionError

    monkeypatch.setattr(api.services.submitter._acceptor, "accept", accept)
    api._server.config.timeout_graceful_shutdown = 1
    answers: list[httpx.Response] = []
    chat = {"model": "large", "messages": [{"role": "user", "content": "a"}]}
    for path, content in (("/v1/jobs", body()), ("/v1/chat/completions", chat)):
        send = lambda path=path, content=content: answers.append(  # noqa: E731
            httpx.post(api.url + path, json=content, timeout=60)
        )
        Thread(target=send, daemon=True).start()
    wait_until(lambda: len(accepting) == 2)
    assert isinstance(api._server, GracefulServer)
    api._server.should_exit = True
    wait_until(lambda: len(answers) == 2)
    for answer in answers:
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (503, "server_is_overloaded")
        assert int(answer.headers["retry-after"]) > 0
        assert answer.headers["x-job-id"] in error["message"]
        assert answer.headers["x-request-id"] == answer.json()["request_id"]


def test_a_bug_behind_the_accept_is_told_with_the_job(http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("of ours")

    monkeypatch.setattr("api.jobs.new_job_view", fail)
    answer = http.post("/v1/jobs", json=body())
    job_id = answer.headers["x-job-id"]
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "server_error")
    assert http.get(f"/v1/jobs/{job_id}").status_code == 200
    assert job_id in answer.json()["error"]["message"]
