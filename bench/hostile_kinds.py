"""More kinds of what one ordinary key can send, beyond bench/hostile_requests.py: a table of requests, and raw sockets.

Each entry of KINDS is one kind. Most are single requests, made anew each time, so that nothing about them is known; the
others speak to the socket, as no client library would, or repeat a request many times.
"""

import asyncio
import base64
import json
import os
import random
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import httpx

from bench.request_cost import MODEL

Send = Callable[[httpx.AsyncClient, random.Random], Awaitable[list[httpx.Response]]]

RAW_SECONDS = 3.0  # how long a raw connection is kept

TEXT = "a"


@dataclass(frozen=True, slots=True)
class Once:
    """One request. `make` draws its JSON body or, of a GET, its query."""

    method: str
    path: str
    make: Callable[[random.Random], Any]
    headers: Mapping[str, str] | None = None

    async def __call__(self, client: httpx.AsyncClient, rng: random.Random) -> list[httpx.Response]:
        made = self.make(rng)
        if self.method != "POST":
            return [await client.request(self.method, self.path, params=made, headers=self.headers)]
        return [await client.post(self.path, json=made, headers=self.headers)]


@dataclass(frozen=True, slots=True)
class OnAJob:
    """A job of its own, and then these requests to it, all at the same time."""

    method: str
    path: str  # with {}
    num_times: int = 1
    query: Mapping[str, str] | None = None
    headers: Mapping[str, str] | None = None

    async def __call__(self, client: httpx.AsyncClient, rng: random.Random) -> list[httpx.Response]:
        submitted = await client.post("/v1/jobs", json=job(rng))
        if submitted.status_code != 202:
            return [submitted]
        path = self.path.format(submitted.json()["id"])
        requests = (
            client.request(self.method, path, params=self.query, headers=self.headers) for _ in range(self.num_times)
        )
        answers = await asyncio.gather(*requests, return_exceptions=True)
        return [submitted, *(answer for answer in answers if isinstance(answer, httpx.Response))]


@dataclass(frozen=True, slots=True)
class Raw:
    """Bytes on a connection of its own, which then reads nothing. {host} and {key} are filled in."""

    head: str
    body: Callable[[random.Random], bytes] = lambda rng: b""

    async def __call__(self, client: httpx.AsyncClient, rng: random.Random) -> list[httpx.Response]:
        host, port = client.base_url.host, client.base_url.port or 80
        head = self.head.format(host=f"{host}:{port}", key=client.headers["authorization"])
        with suppress(OSError, TimeoutError):
            async with asyncio.timeout(RAW_SECONDS):
                _, writer = await asyncio.open_connection(host, port)
                try:
                    writer.write(head.replace("\n", "\r\n").encode() + self.body(rng))
                    await writer.drain()
                    await asyncio.sleep(rng.random() * RAW_SECONDS)
                finally:
                    writer.close()
        return []


def job(rng: random.Random, **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": f"{rng.random()}", "params": {"max_tokens": 1}} | fields


def chat(rng: random.Random, **fields: Any) -> dict[str, Any]:
    message = {"role": "user", "content": f"{rng.random()}"}
    return {"model": MODEL, "messages": [message], "max_tokens": 1, "store": True, "stream": True} | fields


def response(rng: random.Random, **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "input": f"{rng.random()}", "max_output_tokens": 16, "background": True} | fields


def nested(depth: int, leaf: Any = TEXT) -> Any:
    for _ in range(depth):
        leaf = {"a": leaf}
    return leaf


def params(**values: Any) -> Callable[[random.Random], Any]:
    return lambda rng: job(rng, params={"max_tokens": 1, **values})


def _lines(rng: random.Random, **fields: Any) -> list[dict[str, Any]]:
    body = {"model": MODEL, "max_tokens": 1, "messages": [{"role": "user", "content": TEXT}]} | fields
    return [{"custom_id": f"{rng.random()}", "params": body} for _ in range(2_000)]


SAME_IDEMPOTENCY_KEY = {"idempotency-key": "the same"}
UPGRADE = (
    "GET /v1/responses HTTP/1.1\nhost: {host}\nauthorization: {key}\nupgrade: websocket\nconnection: upgrade\n"
    "sec-websocket-version: 13\nsec-websocket-key: " + base64.b64encode(os.urandom(16)).decode() + "\n\n"
)
POST = "POST /v1/jobs HTTP/1.1\nhost: {host}\nauthorization: {key}\ncontent-type: application/json\n"
GET = "GET /v1/jobs HTTP/1.1\nhost: {host}\nauthorization: {key}\n"


def _frame(payload: bytes, *, opcode: int = 1, is_final: bool = True, length: int | None = None) -> bytes:
    """A masked WebSocket frame; `length` is what it claims."""
    claimed = len(payload) if length is None else length
    head = bytes([(0x80 if is_final else 0) | opcode, 0x80 | 127]) + claimed.to_bytes(8, "big")
    return head + b"\0\0\0\0" + payload


def _ask(rng: random.Random) -> bytes:
    return _frame(json.dumps({"type": "response.create", "response": response(rng)}).encode())


KINDS: dict[str, Send] = {}


def always(value: Any) -> Callable[[random.Random], Any]:
    return lambda rng: value


def made(make: Callable[..., Any], **fields: Any) -> Callable[[random.Random], Any]:
    return lambda rng: make(rng, **fields)


def long_lists(size: int) -> dict[str, Send]:
    tool = {"type": "function", "function": {"name": "f", "parameters": nested(5)}}
    item = {"role": "user", "content": [{"type": "input_text", "text": TEXT}]}
    message = {"role": "user", "content": TEXT}
    answer = {"model": MODEL, "max_tokens": 1}
    names = [f"{number}" for number in range(size)]
    return {
        f"{size} tools": Once("POST", "/v1/chat/completions", made(chat, tools=[tool] * size)),
        f"{size} input items": Once("POST", "/v1/responses", made(response, input=[item] * size)),
        f"{size} messages": Once("POST", "/v1/messages", always(answer | {"messages": [message] * size})),
        f"{size} prompts": Once("POST", "/v1/completions", always(answer | {"prompt": names, "stream": True})),
        f"{size} inputs": Once("POST", "/v1/embeddings", always({"model": MODEL, "input": names})),
        f"{size} documents": Once("POST", "/rerank", always({"model": MODEL, "query": TEXT, "documents": names})),
        f"{size} stop strings": Once("POST", "/v1/jobs", params(stop=names)),
        f"{size} logit biases": Once("POST", "/v1/jobs", params(logit_bias=dict.fromkeys(names, 1))),
        f"{size} metadata": Once("POST", "/v1/jobs", made(job, metadata=dict.fromkeys(names, TEXT))),
        f"{size} conversation items": Once("POST", "/v1/conversations", always({"items": [message] * size})),
        f"{size} choices": Once("POST", "/v1/jobs", params(structured_output={"choices": names})),
        f"n={size}": Once("POST", "/v1/jobs", params(n=size)),
    }


def deep(depth: int) -> dict[str, Send]:
    text = '{"a":' * depth + "1" + "}" * depth
    schema = {"structured_output": {"json_schema": text}}
    return {
        f"schema of depth {depth}": Once("POST", "/v1/jobs", made(job, params=schema)),
        f"body of depth {depth}": Raw(POST + f"content-length: {len(text)}\n\n", always(text.encode())),
        f"query of depth {depth}": Once("GET", "/v1/jobs", always({"metadata": "[" * min(depth, 2_000)})),
    }


for size in (0, 1, 33, 200, 5_000):
    KINDS |= long_lists(size)

for depth in (10, 60, 900, 20_000):
    KINDS |= deep(depth)

for name, values in {
    "metadata": {"metadata[a]": "b"},
    "sixteen metadata": {f"metadata[{i}]": "b" for i in range(16)},
    "many metadata": {f"metadata[{i}]": "b" for i in range(400)},
    "long metadata": {"metadata[" + "a" * 900 + "]": "b" * 900},
    "status": {"status": "queued", "limit": "100"},
    "no such status": {"status": "x"},
    "a far cursor": {"after": "job_" + "7" * 26, "limit": "100", "order": "asc"},
    "a page of everything": {"limit": "10000"},
}.items():
    for path in ("/v1/jobs", "/v1/chat/completions", "/v1/files", "/v1/dead_letters"):
        KINDS[f"{path} by {name}"] = Once("GET", path, always(values))

for name, range_of_time in {
    "all time": {"start_time": "0", "limit": "100000"},
    "by minute": {"start_time": "1", "bucket_width": "1m"},
    "every group": {"start_time": "1", "group_by": "model,api_key_id,project_id"},
    "backwards": {"start_time": "2000000000", "end_time": "1"},
    "huge": {"start_time": "9" * 300},
}.items():
    for path in ("/v1/usage", "/v1/organization/usage/completions", "/v1/organization/usage/embeddings"):
        KINDS[f"{path} {name}"] = Once("GET", path, always(range_of_time))

for name, on_a_job in {
    "cancelled 200 times": OnAJob("POST", "/v1/jobs/{}/cancel", 200),
    "retried 20 times": OnAJob("POST", "/v1/jobs/{}/retry", 20),
    "deleted 20 times": OnAJob("DELETE", "/v1/jobs/{}", 20),
    "polled 50 times": OnAJob("GET", "/v1/jobs/{}", 50),
    "waited for 50 times": OnAJob("GET", "/v1/jobs/{}", 50, {"wait": "60"}),
    "waited for a negative time": OnAJob("GET", "/v1/jobs/{}", 1, {"wait": "-1"}),
    "waited for no number": OnAJob("GET", "/v1/jobs/{}", 1, {"wait": "nan"}),
    "waited for ever": OnAJob("GET", "/v1/jobs/{}", 1, {"wait": "1e300"}),
    "streamed from beyond its end": OnAJob("GET", "/v1/jobs/{}/events", 1, {"starting_after": "999999999"}),
    "streamed from no number": OnAJob("GET", "/v1/jobs/{}/events", 1, None, {"last-event-id": "x" * 4_000}),
    "streamed 50 times": OnAJob("GET", "/v1/jobs/{}/events", 50),
    "a durable stream from now": OnAJob("GET", "/v1/jobs/{}/stream", 20, {"offset": "now", "live": "long-poll"}),
    "a durable stream, live": OnAJob("GET", "/v1/jobs/{}/stream", 20, {"offset": "-1", "live": "sse"}),
    "a durable stream from nowhere": OnAJob("GET", "/v1/jobs/{}/stream", 1, {"offset": "9" * 400}),
    "a durable stream, asked for its head": OnAJob("HEAD", "/v1/jobs/{}/stream", 20),
    "a hundred stream tokens": OnAJob("POST", "/v1/jobs/{}/stream_token", 100),
    "its output, unfinished": OnAJob("GET", "/v1/jobs/{}/output", 20, {"index": "99"}),
}.items():
    KINDS[f"a job {name}"] = on_a_job

FIELDS: dict[str, dict[str, Any]] = {
    "a negative priority": {"priority": -10},
    "the highest priority": {"priority": 10},
    "no priority there is": {"priority": 10**30},
    "a deadline in the past": {"deadline": "1970-01-01T00:00:00Z"},
    "a deadline that nobody can meet": {"start_timeout": 0.001},
    "a model that is not there": {"model": "x" * 5_000},
    "an adapter that is not there": {"model": f"{MODEL}:x"},
    "a webhook to itself": {"webhook": "http://127.0.0.1/"},
    "a retention of ages": {"result_ttl": 10**12},
}

for name, fields in FIELDS.items():
    KINDS[f"a job with {name}"] = Once("POST", "/v1/jobs", made(job, **fields))

for name, raw in {
    "a WebSocket that says nothing": Raw(UPGRADE),
    "a WebSocket of garbage": Raw(UPGRADE, lambda rng: rng.randbytes(50_000)),
    "a WebSocket with a frame that never ends": Raw(UPGRADE, lambda rng: _frame(b"a" * 1_000, length=2**40)),
    "a WebSocket of fragments": Raw(
        UPGRADE, lambda rng: _frame(b"a", is_final=False) + 5_000 * _frame(b"a", opcode=0, is_final=False)
    ),
    "a WebSocket of pings": Raw(UPGRADE, lambda rng: 5_000 * _frame(b"a", opcode=9)),
    "a WebSocket with fifty responses": Raw(UPGRADE, lambda rng: b"".join(_ask(rng) for _ in range(50))),
    "a WebSocket of broken JSON": Raw(UPGRADE, lambda rng: 200 * _frame(b"{")),
    "a WebSocket of deep JSON": Raw(UPGRADE, lambda rng: _frame(b"[" * 100_000)),
    "a body of one byte at a time": Raw(POST + "transfer-encoding: chunked\n\n", lambda rng: 20_000 * b"1\r\n \r\n"),
    "a body that never comes": Raw(POST + "content-length: 1000000\n\n"),
    "a body that asks to continue": Raw(POST + "content-length: 1000\nexpect: 100-continue\n\n"),
    "a body of two lengths": Raw(POST + "content-length: 2\ncontent-length: 3\n\n", lambda rng: b"{} "),
    "a negative length": Raw(POST + "content-length: -1\n\n"),
    "a thousand requests in a row": Raw((GET + "\n") * 1_000),
    "a thousand pages nobody reads": Raw((GET.replace("/v1/jobs", "/openapi.json") + "\n") * 200),
    "a head without an end": Raw(GET + "x: " + "a" * 30_000),
    "eight hundred headers": Raw(GET + "".join(f"x{i}: a\n" for i in range(800)) + "\n"),
    "a method of its own": Raw("XYZZY /v1/jobs HTTP/1.1\nhost: {host}\n\n"),
    "another protocol": Raw("PRI * HTTP/2.0\n\nSM\n\n", lambda rng: rng.randbytes(5_000)),
}.items():
    KINDS[name] = raw


async def idempotency_flood(client: httpx.AsyncClient, rng: random.Random) -> list[httpx.Response]:
    """Different bodies under the same key, and the same body twenty times at once."""
    same = job(rng)
    return list(await asyncio.gather(
        *(client.post("/v1/jobs", json=job(rng), headers=SAME_IDEMPOTENCY_KEY) for _ in range(10)),
        *(client.post("/v1/jobs", json=same, headers={"idempotency-key": same["prompt"]}) for _ in range(20)),
    ))  # fmt: skip


async def tiny_lines(client: httpx.AsyncClient, rng: random.Random) -> list[httpx.Response]:
    """A file of 20,000 lines of which none is valid, and a batch of it that is cancelled at once."""
    content = rng.choice([b"{}\n", b"\n", b"0\n", b'{"custom_id":"a"}\r\n', b"\xef\xbb\xbf\n"]) * 20_000
    uploaded = await client.post("/v1/files", files={"file": ("a", content)}, data={"purpose": "batch"})
    if uploaded.status_code != 200:
        return [uploaded]
    batch = {"input_file_id": uploaded.json()["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
    made = await client.post("/v1/batches", json=batch)
    if made.status_code != 200:
        return [uploaded, made]
    return [uploaded, made, await client.post(f"/v1/batches/{made.json()['id']}/cancel")]


async def cache_busting(client: httpx.AsyncClient, rng: random.Random) -> list[httpx.Response]:
    texts = [f"{rng.random()} " * 200 for _ in range(20)]
    return list(await asyncio.gather(
        *(client.post("/tokenize", json={"model": MODEL, "prompt": text}) for text in texts),
    ))  # fmt: skip


KINDS |= {
    "idempotency keys": idempotency_flood,
    "a file of tiny lines": tiny_lines,
    "a cache's worth of prompts": cache_busting,
    "a batch of messages": Once("POST", "/v1/messages/batches", lambda rng: {"requests": _lines(rng)}),
    "a batch of bad messages": Once("POST", "/v1/messages/batches", lambda rng: {"requests": _lines(rng, model=1)}),
    "a webhook endpoint": Once("POST", "/v1/webhook_endpoints", lambda rng: {
        "url": f"https://h{rng.randrange(10**6)}.invalid/", "event_types": ["job.completed"]}),
    "a compaction": Once("POST", "/v1/responses/compact", lambda rng: response(rng, input=TEXT * 50_000)),
    "a response after none": Once("POST", "/v1/responses", lambda rng: response(
        rng, previous_response_id="resp_" + "0" * 26)),
}  # fmt: skip


async def try_kinds(client: httpx.AsyncClient, names: list[str], *, seed: int) -> dict[str, list[httpx.Response]]:
    """One of each kind, one after the other."""
    answers = {}
    for name in names:
        with suppress(httpx.TimeoutException, httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError):
            answers[name] = await KINDS[name](client, random.Random(f"{seed} {name}"))
    return answers
