"""HEAD wherever GET is, OPTIONS everywhere, and `Allow` that tells the truth (RFC 9110, 9.3.2, 9.3.7 and 15.5.6)."""

import re
import socket

import httpx
import pytest

from tests.integration.api_harness import ApiServer, post_job
from tests.waiting import SECONDS, wait_until

OF_ONE_ANSWER = {"date", "x-request-id", "content-length"}  # figures differ in length from one moment to the next


def paths_of(http: httpx.Client, method: str) -> list[str]:
    paths = http.get("/openapi.json").json()["paths"]
    return [re.sub(r"\{[^}]+\}", "x", path) for path, routes in paths.items() if method in routes]


def answer_to(port: int, data: bytes) -> bytes:
    """All that comes until the server closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as connection:
        connection.sendall(data)
        return b"".join(iter(lambda: connection.recv(65_536), b""))


def names(response: httpx.Response) -> set[str]:
    return {name for name in response.headers if name not in OF_ONE_ANSWER}


def test_every_get_answers_head_alike_and_without_a_body(http: httpx.Client) -> None:
    paths = [*paths_of(http, "get"), "/health/live", "/metrics", "/openapi.json", "/docs", "/v1/images/x"]
    for path in paths:
        got, head = http.get(path), http.head(path)
        assert (head.status_code, names(head)) == (got.status_code, names(got)), path
        assert head.content == b""
        assert int(head.headers["content-length"]) > 0, path


def test_a_head_is_as_long_as_the_get_says(http: httpx.Client) -> None:
    job = post_job(http)
    for path in (job["urls"]["get"] + "/output", "/v1/models", "/v1/jobs/nothing"):
        assert http.head(path).headers["content-length"] == http.get(path).headers["content-length"], path


def test_a_head_of_a_stream_ends_with_its_headers(http: httpx.Client, api: ApiServer) -> None:
    events = post_job(http)["urls"]["get"] + "/events"
    head = http.head(events)
    assert head.status_code == 200
    assert head.headers["content-type"].startswith("text/event-stream")
    assert http.get("/health/live").status_code == 200, "the connection goes on"
    wait_until(lambda: api.services.slots.num_taken == 0)


def test_the_body_of_a_head_never_reaches_the_wire(http: httpx.Client, api: ApiServer) -> None:
    job_id = post_job(http)["id"]
    for path in ("/health/live", "/nowhere", f"/v1/jobs/{job_id}/events"):
        answer = answer_to(api.port, f"HEAD {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
        assert answer.endswith(b"\r\n\r\n"), path
        assert answer.count(b"\r\n\r\n") == 1, path


def test_options_tell_what_a_path_answers_and_ask_for_no_key(http: httpx.Client, api: ApiServer) -> None:
    api.services.authenticator._is_open = False
    assert http.get("/v1/jobs").status_code == 401
    for path, allow in {
        "/v1/jobs": "GET, HEAD, OPTIONS, POST",
        "/v1/jobs/job_01": "DELETE, GET, HEAD, OPTIONS",
        "/v1/chat/completions": "GET, HEAD, OPTIONS, POST",
        "/v1/responses/input_tokens": "OPTIONS, POST",
        "/health": "GET, HEAD, OPTIONS",
    }.items():
        answer = http.options(path)
        assert (answer.status_code, answer.headers["allow"], answer.content) == (204, allow, b""), path
    assert http.options("/nowhere").status_code == 404


def test_every_path_allows_what_the_document_says_of_it(http: httpx.Client) -> None:
    for path, routes in http.get("/openapi.json").json()["paths"].items():
        allow = http.options(re.sub(r"\{[^}]+\}", "x", path)).headers["allow"].split(", ")
        assert {method.upper() for method in routes} <= set(allow), path
        assert ("HEAD" in allow) == ("GET" in allow), path


@pytest.mark.parametrize("method", ["TRACE", "PROPFIND", "PATCH"])
def test_a_method_that_no_route_has_is_told_those_it_has(http: httpx.Client, method: str) -> None:
    answer = http.request(method, "/v1/jobs")
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD, OPTIONS, POST")


def test_options_may_ask_for_the_whole_server(api: ApiServer) -> None:
    answer = answer_to(api.port, b"OPTIONS * HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 204 ")
    assert b"\r\nallow: DELETE, GET, HEAD" in answer
