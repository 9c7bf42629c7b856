"""Uploads that trickle end and give their places back."""

import gc
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from functools import partial

import httpx
import pytest
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from tests.integration.api_harness import ApiServer
from tests.waiting import wait_until

HEAD = (
    b"POST /v1/files HTTP/1.1\r\nhost: localhost\r\ncontent-type: multipart/form-data; boundary=x\r\n"
    b"content-length: 100000\r\n\r\n"
)
PART = b'--x\r\ncontent-disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'


def upload(http: httpx.Client) -> httpx.Response:
    return http.post("/v1/files", files={"file": ("a.jsonl", b"{}\n")}, data={"purpose": "batch"})


@pytest.fixture
def trickling(api: ApiServer) -> Iterator[list[socket.socket]]:
    """Uploads that take every place."""
    with ExitStack() as stack:
        connections = []
        for _ in range(api.services.settings.max_uploads):
            address = ("127.0.0.1", api.port)
            connections.append(stack.enter_context(closing(socket.create_connection(address, timeout=30))))
            connections[-1].sendall(HEAD + PART)
        wait_until(lambda: api.services.uploads.num_taken == len(connections))
        yield connections


def test_uploads_that_trickle_give_their_places_back(
    http: httpx.Client, trickling: list[socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert upload(http).status_code == 503
    monkeypatch.setattr("api.openai.files.GRACE_SECONDS", 0.1)
    monkeypatch.setattr("api.connections.DISCARD_SECONDS", 0.2)
    for connection in trickling:
        connection.sendall(b"a")  # not silent, but far too slow
    for connection in trickling:
        answer = b"".join(iter(partial(connection.recv, 65_536), b""))
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"bytes per second or more" in answer
    monkeypatch.undo()
    assert upload(http).status_code == 200


def test_an_upload_that_keeps_the_rate_goes_on_past_the_grace(api: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.openai.files.GRACE_SECONDS", 0.5)
    monkeypatch.setattr("api.openai.files.MIN_BYTES_PER_SECOND", 1.0)
    content = PART + b'{}\n\r\n--x\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--x--\r\n'
    head = HEAD.replace(b"100000", str(len(content)).encode())
    with closing(socket.create_connection(("127.0.0.1", api.port), timeout=30)) as connection:
        connection.sendall(head + content[:-10])
        time.sleep(1.0)
        connection.sendall(content[-10:])
        assert connection.recv(65_536).startswith(b"HTTP/1.1 200 ")


def test_bodies_of_refused_uploads_are_not_kept(api: ApiServer, http: httpx.Client) -> None:
    """Until garbage is collected, which is rare."""
    api.services.uploads.num_places = 0
    content = {"file": ("a.jsonl", b"a" * 200_000)}
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            assert http.post("/v1/files", files=content, data={"purpose": "batch"}).status_code == 503
        wait_until(lambda: not [one for one in gc.get_objects() if isinstance(one, RequestResponseCycle) and one.body])
    finally:
        gc.enable()
