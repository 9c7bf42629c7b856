"""One job by each of the routes that stream, timed to its first token, for bench/time_to_first_token.py."""

import http.client
import json
import time
from collections.abc import Callable
from typing import Any, NamedTuple

PROMPT = "Once upon a time, a fox"
MAX_TOKENS = 4
WITH_SEED = {"max_tokens": MAX_TOKENS, "seed": 1}


class FirstToken(NamedTuple):
    """All in seconds from the first byte of the request."""

    job_id: str
    answered: float  # until the answer's head, which leaves after the commit
    first: float  # until the first text


def by_job(port: int, model: str) -> FirstToken:
    """Two requests: submit the job, then read its events."""
    connection = _connection(port)
    started = time.perf_counter()
    job_id = str(json.loads(_post(connection, "/v1/jobs", model, params=WITH_SEED).read())["id"])
    answered = time.perf_counter()
    reading = _connection(port)
    reading.request("GET", f"/v1/jobs/{job_id}/events")
    _read_until(reading.getresponse(), b"event: output.delta")
    first = time.perf_counter()
    reading.close()
    connection.close()
    return FirstToken(job_id, answered - started, first - started)


def by_completion(port: int, model: str) -> FirstToken:
    return _streamed(port, "/v1/completions", b'"text":', model, stream=True, **WITH_SEED)


def by_generate_stream(port: int, model: str) -> FirstToken:
    return _streamed(port, "/generate_stream", b'"token"', model, max_new_tokens=MAX_TOKENS)


ROUTES: dict[str, Callable[[int, str], FirstToken]] = {
    "jobs": by_job,
    "completions": by_completion,
    "generate_stream": by_generate_stream,
}


def ask(port: int, path: str) -> dict[str, Any]:
    connection = _connection(port)
    connection.request("GET", path)
    answer = dict(json.loads(connection.getresponse().read()))
    connection.close()
    return answer


def _streamed(port: int, path: str, marker: bytes, model: str, **fields: object) -> FirstToken:
    connection = _connection(port)
    started = time.perf_counter()
    response = _post(connection, path, model, **fields)
    answered = time.perf_counter()
    _read_until(response, marker)
    first = time.perf_counter()
    response.read()
    connection.close()
    return FirstToken(str(response.headers["x-job-id"]), answered - started, first - started)


def _connection(port: int) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.connect()
    return connection


def _post(connection: http.client.HTTPConnection, path: str, model: str, **fields: object) -> http.client.HTTPResponse:
    body = json.dumps({"model": model, "prompt": PROMPT, **fields})
    connection.request("POST", path, body, {"content-type": "application/json"})
    response = connection.getresponse()
    assert response.status in (200, 202), response.read()
    return response


def _read_until(response: http.client.HTTPResponse, marker: bytes) -> None:
    while line := response.readline():
        if marker in line:
            return
    raise AssertionError(f"the stream ended without {marker!r}")
