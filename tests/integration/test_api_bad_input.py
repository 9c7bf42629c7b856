"""What cannot be: always a 4xx in the one error shape, with the field, the value seen and the remedy; never a 500."""

import json
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import httpx
import pytest

from tests.integration.api_harness import CONTEXT, MODEL, ApiServer, body, post_job, raw_request
from tests.waiting import SECONDS

SECRET = "my diary entry"

REFUSED: dict[str, tuple[dict[str, Any] | str | bytes, int, str, str | None, str]] = {
    # name: body, status, code, param, words of the message
    "unknown model": (body(model="gpt-9"), 404, "model_not_found", "model", "choose one of: fake, large"),
    "model with NUL": (body(model="fa\0ke"), 404, "model_not_found", "model", "is not served here"),
    "empty prompt": (body(prompt=""), 400, "invalid_value", "prompt", "at least 1 character"),
    "no messages": ({"model": MODEL, "messages": []}, 400, "invalid_value", "messages", "at least 1 item"),
    "both inputs": (
        body(messages=[{"role": "user", "content": "b"}]),
        400,
        "invalid_value",
        None,
        "exactly one of prompt, messages and prompt_token_ids",
    ),
    "prompt beyond the context": (
        body(prompt="x" * CONTEXT),
        400,
        "context_length_exceeded",
        "prompt",
        "has 64 tokens but fake has a context of 64 tokens for prompt and output together; shorten it by at least 1",
    ),
    "messages beyond the context": (
        {"model": MODEL, "messages": [{"role": "user", "content": "x" * 100}]},
        400,
        "context_length_exceeded",
        "messages",
        "shorten it",
    ),
    "endless prompt": (body(prompt="x" * 900_000), 400, "context_length_exceeded", "prompt", "900000 characters"),
    "too many tokens asked for": (
        body(params={"max_tokens": 60}),
        400,
        "context_length_exceeded",
        "params.max_tokens",
        "lower max_tokens to 59",
    ),
    "more min than max": (body(params={"min_tokens": 60}), 400, "invalid_value", "params.min_tokens", "lower it"),
    "wrong type": (body(params={"max_tokens": "ten"}), 400, "invalid_value", "params.max_tokens", 'is "ten"'),
    "temperature beyond bounds": (
        body(params={"temperature": 3}),
        400,
        "invalid_value",
        "params.temperature",
        "is 3: it must be less than or equal to 2",
    ),
    "NaN": ('{"model":"fake","prompt":"a","params":{"temperature":NaN}}', 400, "invalid_value", None, "NaN"),
    "unknown field": (body(promt="x"), 400, "invalid_value", "promt", "did you mean prompt?"),
    "server's own field": (body(tenant_id="x"), 400, "invalid_value", "tenant_id", "is not a known field"),
    "too many choices": (body(params={"n": 17}), 400, "invalid_value", "params.n", "is 17"),
    "more choices than slots": (body(params={"n": 8}), 400, "invalid_value", "params.n", "runs 4 sequences at once"),
    "token outside the vocabulary": (
        body(params={"logit_bias": {"99999": 1}}),
        400,
        "invalid_value",
        "params.logit_bias",
        "ids 0 to 256",
    ),
    "huge integer": (body(params={"seed": 10**30}), 400, "invalid_value", "params.seed", "must be"),
    "huge token id": (body(params={"stop_token_ids": [10**30]}), 400, "invalid_value", "params.stop_token_ids", ""),
    "lone surrogate": ('{"model":"fake","prompt":"\\ud800"}', 400, "invalid_value", None, "not JSON"),
    "NUL in metadata": (body(metadata={"a": "b\0"}), 400, "invalid_value", "metadata.a", "string of 2 characters"),
    "NUL in a metadata name": (body(metadata={"a\0": "b"}), 400, "invalid_value", None, ""),
    "too much metadata": (body(metadata={str(n): "" for n in range(17)}), 400, "invalid_value", "metadata", "16"),
    "long metadata": (body(metadata={"a": "x" * 513}), 400, "invalid_value", "metadata.a", "513 characters"),
    "blank in idempotency key": (
        body(idempotency_key="a b"),
        400,
        "invalid_value",
        "idempotency_key",
        "string of 3 characters",
    ),
    "long idempotency key": (body(idempotency_key="k" * 256), 400, "invalid_value", "idempotency_key", "256"),
    "passed deadline": (body(deadline="2020-01-01T00:00:00Z"), 400, "invalid_value", "deadline", "a future time"),
    "deadline beyond time": (
        body(deadline="9999-12-31T23:59:59-14:00"),
        400,
        "invalid_value",
        "deadline",
        "within 365 days",
    ),
    "deadline in seconds": (body(deadline=0.5), 400, "invalid_value", "deadline", "datetime, such as 2026-"),
    "deadline without zone": (body(deadline="2030-01-01T00:00:00"), 400, "invalid_value", "deadline", "timezone"),
    "priority": (body(priority=11), 400, "invalid_value", "priority", "less than or equal to 10"),
    "negative timeout": (body(start_timeout=-1), 400, "invalid_value", "start_timeout", "greater than 0"),
    "endless timeout": ('{"model":"fake","prompt":"a","run_timeout":1e999}', 400, "invalid_value", "run_timeout", ""),
    "short life": (body(result_ttl=1), 400, "invalid_value", "result_ttl", "60"),
    "duplicate key": ('{"model":"fake","prompt":"a","prompt":"b"}', 400, "invalid_value", "prompt", "more than once"),
    "deep JSON": ('{"a":' * 50 + "1" + "}" * 50, 400, "invalid_value", None, "nested"),
    "no JSON": (b"\x00\xff", 400, "invalid_value", None, "not UTF-8"),
    "empty": (b"", 400, "invalid_value", None, "empty"),
    "too large": ("[" + "1," * 5_000_000 + "1]", 413, "request_too_large", None, "at most 1048576"),
}


def assert_refused(response: httpx.Response, status: int, code: str, param: str | None, words: str) -> None:
    answer = response.json()
    assert response.status_code == status, answer
    assert set(answer) == {"error", "request_id"}
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["code"] == code
    assert answer["error"]["type"].endswith(("_error", "gone"))
    assert param is None or str(answer["error"]["param"]).startswith(param)
    assert words in answer["error"]["message"]
    assert answer["request_id"] == response.headers["x-request-id"]
    assert response.headers["content-type"] == "application/json"


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_job_is_refused_in_the_one_shape(http: httpx.Client, name: str) -> None:
    content, status, code, param, words = REFUSED[name]
    if isinstance(content, dict):
        response = http.post("/v1/jobs", json=content)
    else:
        response = http.post("/v1/jobs", content=content, headers={"content-type": "application/json"})
    assert_refused(response, status, code, param, words)
    assert http.get("/v1/jobs").json()["data"] == []


@pytest.mark.parametrize("prompt", ["NUL \0", "\x1b[0m", "‮", "￿", "🏳️‍🌈", "\r\n\r\nHTTP/1.1 200 OK"])
def test_odd_text_is_a_prompt_like_any_other(http: httpx.Client, prompt: str) -> None:
    job = post_job(http, prompt=prompt)
    assert http.get(job["urls"]["get"], params={"include": "input"}).json()["input"]["prompt"] == prompt


@pytest.mark.parametrize(
    ("content_type", "encoding"),
    [("text/plain", None), ("application/x-www-form-urlencoded", None), ("application/json", "gzip"), ("", None)],
)
def test_what_is_not_plain_json_is_refused(http: httpx.Client, content_type: str, encoding: str | None) -> None:
    headers = {"content-type": content_type} | ({"content-encoding": encoding} if encoding else {})
    response = http.post("/v1/jobs", content=b'{"model":"fake","prompt":"a"}', headers=headers)
    assert_refused(response, 415, "unsupported_media_type", None, "send")


def test_a_chunked_body_beyond_the_limit_is_refused(http: httpx.Client) -> None:
    def parts() -> Iterator[bytes]:
        for _ in range(40):
            yield b" " * 65_536

    response = http.post("/v1/jobs", content=parts(), headers={"content-type": "application/json"})
    assert_refused(response, 413, "request_too_large", None, "send at most")


@pytest.mark.parametrize(
    "job_id", ["job_", "x", "job_" + "0" * 26, "job_" + "0" * 25 + "é", "a" * 3000, "%00", "..%2f..", "job_\u202e"]
)
def test_every_id_that_is_not_ones_own_is_simply_not_there(http: httpx.Client, job_id: str) -> None:
    for method, path in [("GET", ""), ("GET", "/events"), ("GET", "/output"), ("POST", "/cancel"), ("DELETE", "")]:
        response = http.request(method, f"/v1/jobs/{job_id}{path}")
        assert response.status_code == 404
        assert response.json()["error"]["code"] in ("job_not_found", "not_found")


@pytest.mark.parametrize(
    ("query", "param", "words"),
    [
        ("limit=0", "limit", "greater than or equal to 1"),
        ("limit=101", "limit", "less than or equal to 100"),
        ("limit=ten", "limit", "valid integer"),
        ("status=running", "status", "'queued', 'in_progress'"),
        ("order=up", "order", "'asc' or 'desc'"),
        ("created_after=yesterday", "created_after", "write it as 2026-"),
        ("created_after=2026-01-01T00:00:00", "created_after", "timezone"),
        ("after=job_1", "after", "is not a job id"),
        ("satus=queued", "satus", "did you mean status?"),
        ("limit=1&limit=2", "limit", "more than once"),
        ("metadata=1&metadata[a]=1", "metadata[a]", "more than once"),
        ("metadata[a]=1&metadata[a]=2", "metadata[a]", "more than once"),
        ("model=a%00b", "model", "pattern"),
    ],
)
def test_a_bad_filter_is_refused(http: httpx.Client, query: str, param: str, words: str) -> None:
    response = http.get(f"/v1/jobs?{query}")
    code = "invalid_cursor" if param == "after" else "invalid_value"
    assert_refused(response, 400, code, param, words)


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("?wait=61", "wait"),
        ("?wait=-1", "wait"),
        ("?include=secrets", "include"),
        ("?wiat=5", "wiat"),
        ("/events?from=end", "from"),
        ("/events?from_=start", "from_"),
        ("/events?include=text", "include"),
        ("/output?index=-1", "index"),
    ],
)
def test_a_bad_question_about_a_job_is_refused(http: httpx.Client, path: str, param: str) -> None:
    job_id = post_job(http)["id"]
    assert_refused(http.get(f"/v1/jobs/{job_id}{path}"), 400, "invalid_value", param, param)


@pytest.mark.parametrize("query", ["metadata[a%00]=b", "metadata[a]=b%00", "metadata[]=", "metadata[a'--]=\"%5C"])
def test_odd_metadata_filters_find_nothing(http: httpx.Client, query: str) -> None:
    post_job(http, metadata={"a": "b"})
    response = http.get(f"/v1/jobs?{query}")
    assert response.status_code in (200, 400)
    assert response.status_code == 400 or response.json()["data"] == []


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("GET", "/v1/jobs/", 404, "not_found"),
        ("PUT", "/v1/jobs", 405, "method_not_allowed"),
        ("POST", "/v1/queue", 405, "method_not_allowed"),
        ("POST", "/health", 405, "method_not_allowed"),
        ("PATCH", "/v1/jobs", 405, "method_not_allowed"),
        ("GET", "/v1/responses/input_tokens", 405, "method_not_allowed"),
        ("DELETE", "/v1/responses/input_tokens", 405, "method_not_allowed"),
    ],
)
def test_what_is_not_there_has_the_same_shape(
    http: httpx.Client, method: str, path: str, status: int, code: str
) -> None:
    response = http.request(method, path)
    assert_refused(response, status, code, None, path)


def test_a_bug_of_ours_is_an_opaque_500(
    http: httpx.Client, api: ApiServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError(f"the first line\n{SECRET}")

    monkeypatch.setattr("api.jobs.new_job_view", fail)
    response = http.post("/v1/jobs", json=body(prompt=SECRET))
    assert_refused(response, 500, "server_error", None, "quote the request id")
    assert "RuntimeError" not in response.text
    assert SECRET not in response.text


def answer_of(raw: bytes) -> tuple[int, dict[str, Any]]:
    head, _, content = raw.partition(b"\r\n\r\n")
    return int(head.split()[1]), dict(json.loads(content))


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x00\xff\xff",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
        b"POST /v1/jobs HTTP/1.1\r\ncontent-length: -5\r\n\r\n",
        b"POST /v1/jobs HTTP/1.1\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    ],
)
def test_bytes_that_are_no_http_are_refused_in_the_same_shape(http: httpx.Client, api: ApiServer, data: bytes) -> None:
    status, answer = answer_of(raw_request(api.port, data))
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
    assert http.get("/health/live").status_code == 200


@pytest.mark.parametrize("part", [b"x: " + b"y" * 1000 + b"\r\n", b"y" * 1000])
def test_a_head_without_end_is_cut_off(api: ApiServer, part: bytes) -> None:
    status, answer = answer_of(raw_request(api.port, b"GET /health HTTP/1.1\r\nhost: localhost\r\nz: " + part * 40))
    assert (status, answer["error"]["code"]) == (431, "invalid_value")


def test_a_long_body_and_the_next_request_may_arrive_together(api: ApiServer) -> None:
    content = json.dumps(body(model="large", prompt="x" * 90_000)).encode()
    head = "POST /v1/jobs HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: "
    one = f"{head}{len(content)}\r\n\r\n".encode() + content
    with closing(socket.create_connection(("127.0.0.1", api.port), timeout=SECONDS)) as connection:
        connection.sendall(one + one + b"GET /health/live HTTP/1.1\r\nhost: localhost\r\n")
        time.sleep(0.2)
        connection.sendall(b"connection: close\r\n\r\n")
        answers = b""
        while part := connection.recv(65_536):
            answers += part
    assert answers.count(b"HTTP/1.1 202 ") == 2
    assert answers.count(b"HTTP/1.1 200 ") == 1


@pytest.mark.parametrize("data", [b"", b"GET /health HTTP/1.1\r\nhost: "])
def test_a_head_that_does_not_come_ends_the_connection(
    api: ApiServer, monkeypatch: pytest.MonkeyPatch, data: bytes
) -> None:
    monkeypatch.setattr("api.connections.HEAD_SECONDS", 0.2)
    with closing(socket.create_connection(("127.0.0.1", api.port), timeout=SECONDS)) as connection:
        connection.sendall(data)
        assert connection.recv(1000) == b""


def test_a_connection_may_be_idle_between_two_requests(http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.connections.HEAD_SECONDS", 0.2)
    assert http.get("/health/live").status_code == 200
    time.sleep(0.5)
    assert http.get("/health/live").status_code == 200


def test_a_body_that_trickles_in_is_given_up_on(api: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.inputs.BODY_SECONDS", 0.2)
    monkeypatch.setattr("api.connections.DISCARD_SECONDS", 0.2)
    head = b"POST /v1/jobs HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n{"
    with closing(socket.create_connection(("127.0.0.1", api.port))) as connection:
        connection.sendall(head)
        status, answer = answer_of(b"".join(iter(lambda: connection.recv(65_536), b"")))
    assert (status, answer["error"]["code"]) == (408, "request_timeout")


def test_a_client_that_hangs_up_in_its_body_leaves_nothing(http: httpx.Client, api: ApiServer) -> None:
    head = b"POST /v1/jobs HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n{"
    raw_request(api.port, head)
    assert http.get("/v1/jobs").json()["data"] == []
