"""Requests of one ordinary key that are expensive, malformed or abandoned, and one operation of each kind of another's.

Used by bench/hostile.py and, a sample of them, by the tests. Everything is drawn from one random generator, so a seed
repeats a run. What a request may be answered: anything below 500, or a 503 or 529 that says when to come back.
"""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from urllib.parse import quote

import httpx

from bench.request_cost import MODEL, bodies_by_kind

PATIENCE_SECONDS = 2.0  # how long the hostile client waits before it hangs up

Attack = Callable[[httpx.AsyncClient, random.Random], Awaitable[list[httpx.Response]]]

JSON = {"content-type": "application/json"}

TRICKS = [
    b"", b"{", b"[]", b"null", b'"a"', b"\x00", b"\xff\xfe{\x00}\x00", b'{"model":"\\ud800"}', b'{"a":1e400}',
    b'{"a":NaN}', b'{"a":' + b"9" * 5_000 + b"}", b"[" * 100_000, b'{"a":' * 50_000, b'{"prompt":"a","prompt":"b"}',
]  # fmt: skip

IDS = [
    "job_" + "0" * 26,
    "job_" + "Z" * 26,
    "0" * 36,
    "..",
    "%00",
    "a" * 4_000,
    "job_\u202e",
    "'; DROP TABLE jobs; --",
    "-1",
]

READS = [
    "/v1/jobs/{}",
    "/v1/jobs/{}/events",
    "/v1/jobs/{}/output",
    "/v1/files/{}",
    "/v1/batches/{}",
    "/v1/responses/{}",
]

LARGE = list(bodies_by_kind().values())

LISTS = ["/v1/jobs", "/v1/files", "/v1/batches", "/v1/dead_letters", "/v1/webhook_deliveries", "/v1/chat/completions"]


async def large_body(client: httpx.AsyncClient, rng: random.Random) -> list[httpx.Response]:
    kind = rng.choice(LARGE)
    return [await client.post(kind.path, content=kind.body, headers=JSON)]


async def malformed_body(client: httpx.AsyncClient, rng: random.Random) -> list[httpx.Response]:
    path = rng.choice(["/v1/jobs", "/v1/chat/completions", "/v1/responses", "/v1/messages", "/v1/batches", "/generate"])
    headers = {"content-type": rng.choice(["application/json", "text/plain", "", "application/json; charset=utf-16"])}
    return [await client.post(path, content=rng.choice(TRICKS), headers=headers)]


async def strange_id(client: httpx.AsyncClient, rng: random.Random) -> list[httpx.Response]:
    path = rng.choice(READS).format(quote(rng.choice(IDS), safe=""))
    return [await client.request(rng.choice(["GET", "DELETE", "POST", "PUT"]), path)]


async def strange_query(client: httpx.AsyncClient, rng: random.Random) -> list[httpx.Response]:
    names = ["limit", "after", "order", "metadata[a]", "status", "wait", "starting_after", "x"]
    values = ["-1", "9" * 400, "job_" + "0" * 26, "\x00", "desc", "", "null"]
    return [await client.get(rng.choice(LISTS), params={rng.choice(names): rng.choice(values) for _ in range(3)})]


async def costly_grammar(client: httpx.AsyncClient, rng: random.Random) -> list[httpx.Response]:
    """Another one each time, so that no verdict is known."""
    number = rng.randrange(10**9)
    letters = "abcdefghijklmnop"
    output = rng.choice([
        {"json_schema": {"allOf": [{"type": "string", "pattern": f".*{a}{number}.*"} for a in letters]}},
        {"json_schema": {"type": "integer", "multipleOf": 99_999_989 + 2 * number}},
        {"regex": f"(.*{number}){{200}}"},
        {"lark": "start: " + "(" * 3_000 + f'"{number}"' + ")" * 3_000},
        {"json_schema": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}},
    ])  # fmt: skip
    job = {"model": MODEL, "prompt": "a", "params": {"structured_output": output, "max_tokens": 1}}
    return [await client.post("/v1/jobs", json=job)]


async def long_prompt(client: httpx.AsyncClient, rng: random.Random) -> list[httpx.Response]:
    text = rng.choice(["\u200d\ud55c", "a", "\u0301", " ", "\U0001f600"]) * 8_000
    if rng.random() < 0.5:
        return [await client.post("/v1/jobs", json={"model": MODEL, "prompt": text})]
    return [await client.post("/tokenize", json={"model": MODEL, "prompt": text})]


async def abandoned_stream(client: httpx.AsyncClient, rng: random.Random) -> list[httpx.Response]:
    submitted = await client.post("/v1/jobs", json={"model": MODEL, "prompt": "a", "params": {"max_tokens": 2}})
    answers = [submitted]
    if submitted.status_code == 202:
        path = f"/v1/jobs/{submitted.json()['id']}/events"
        for _ in range(rng.randrange(1, 8)):
            async with client.stream("GET", path) as stream:
                answers.append(stream)
                if stream.status_code >= 400:
                    await stream.aread()
                    continue
                async for _part in stream.aiter_raw():
                    break
    return answers


async def abandoned_chat(client: httpx.AsyncClient, rng: random.Random) -> list[httpx.Response]:
    chat = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "a"}],
        "stream": rng.random() < 0.5,
        "max_tokens": 4,
    }
    with suppress(httpx.TimeoutException):
        return [await client.post("/v1/chat/completions", json=chat, timeout=0.3)]
    return []


async def cancel_storm(client: httpx.AsyncClient, rng: random.Random) -> list[httpx.Response]:
    submitted = await client.post("/v1/jobs", json={"model": MODEL, "prompt": "a", "priority": 10})
    answers = [submitted]
    if submitted.status_code == 202:
        path = f"/v1/jobs/{submitted.json()['id']}"
        answers += await asyncio.gather(*(client.post(f"{path}/cancel") for _ in range(8)))
        answers += await asyncio.gather(*(client.post(f"{path}/retry") for _ in range(2)))
        answers.append(await client.delete(path))
    return answers


async def long_poll(client: httpx.AsyncClient, rng: random.Random) -> list[httpx.Response]:
    with suppress(httpx.TimeoutException):
        return [await client.post("/v1/jobs", json={"model": MODEL, "prompt": "a"}, headers={"prefer": "wait=60"})]
    return []


async def slow_upload(client: httpx.AsyncClient, rng: random.Random) -> list[httpx.Response]:
    async def trickle() -> AsyncIterator[bytes]:
        yield b'--x\r\ncontent-disposition: form-data; name="file"; filename="../../a"\r\n\r\n'
        for _ in range(20):
            await asyncio.sleep(0.5)
            yield b"a"

    with suppress(httpx.TimeoutException, httpx.RemoteProtocolError, httpx.WriteError):
        headers = {"content-type": "multipart/form-data; boundary=x"}
        return [await client.post("/v1/files", content=trickle(), headers=headers)]
    return []


async def bad_batch(client: httpx.AsyncClient, rng: random.Random) -> list[httpx.Response]:
    lines = [
        rng.choice([b"{", b"null", b'{"custom_id":"a"}', b"\xff", b"[" * 9_000, b"x" * 100_000]) for _ in range(50)
    ]
    uploaded = await client.post(
        "/v1/files", files={"file": ("a\r\nb.jsonl", b"\n".join(lines))}, data={"purpose": "batch"}
    )
    if uploaded.status_code != 200:
        return [uploaded]
    batch = {"input_file_id": uploaded.json()["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
    return [uploaded, await client.post("/v1/batches", json=batch)]


async def webhook_to_nowhere(client: httpx.AsyncClient, rng: random.Random) -> list[httpx.Response]:
    hosts = ["203.0.113.9", "127.0.0.1", "0x7f.1", "[::ffff:10.0.0.1]", f"h{rng.randrange(10**6)}.invalid", "a" * 300]
    url = f"https://{rng.choice(hosts)}/{rng.randrange(10**6)}"
    return [await client.post("/v1/jobs", json={"model": MODEL, "prompt": "a", "webhook": url})]


ATTACKS: list[tuple[str, Attack]] = [
    (attack.__name__, attack)
    for attack in (
        large_body,
        malformed_body,
        strange_id,
        strange_query,
        costly_grammar,
        long_prompt,
        abandoned_stream,
        abandoned_chat,
        cancel_storm,
        long_poll,
        slow_upload,
        bad_batch,
        webhook_to_nowhere,
    )
]


def complaint_about(answer: httpx.Response) -> str | None:
    """Why this is no proper answer, whatever was asked."""
    if answer.status_code < 500 or answer.status_code == 501:
        return None
    if answer.status_code in (503, 529) and "retry-after" in answer.headers:
        return None
    return f"{answer.request.method} {answer.request.url.path[:80]} was answered {answer.status_code}"


async def attack(
    client: httpx.AsyncClient,
    attacks: Sequence[tuple[str, Attack]],
    *,
    num_requests: int,
    num_at_once: int,
    seed: int,
) -> tuple[dict[str, int], list[str]]:
    """Runs the attacks, by name, in turn, so that each kind has its part. Returns how often each status came, and the
    complaints."""
    statuses: dict[str, int] = {}
    complaints: list[str] = []
    numbers = iter(range(num_requests))

    async def go_on() -> None:
        for number in numbers:
            rng = random.Random(f"{seed} {number}")
            name, make = attacks[number % len(attacks)]
            try:
                answers = await make(client, rng)
            except (httpx.TimeoutException, httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError) as exc:
                statuses[type(exc).__name__] = statuses.get(type(exc).__name__, 0) + 1
                continue
            for answer in answers:
                statuses[str(answer.status_code)] = statuses.get(str(answer.status_code), 0) + 1
                if complaint := complaint_about(answer):
                    complaints.append(f"{name}: {complaint}")

    await asyncio.gather(*(go_on() for _ in range(num_at_once)))
    return statuses, complaints


async def submit(client: httpx.AsyncClient) -> None:
    job = {"model": MODEL, "prompt": "mine", "params": {"max_tokens": 1}}
    (await client.post("/v1/jobs", json=job)).raise_for_status()


async def read_back(client: httpx.AsyncClient) -> None:
    submitted = await client.post("/v1/jobs", json={"model": MODEL, "prompt": "mine"})
    (await client.get(f"/v1/jobs/{submitted.raise_for_status().json()['id']}")).raise_for_status()


async def stream(client: httpx.AsyncClient) -> None:
    submitted = await client.post("/v1/jobs", json={"model": MODEL, "prompt": "mine"})
    path = f"/v1/jobs/{submitted.raise_for_status().json()['id']}/events"
    async with client.stream("GET", path) as events:
        events.raise_for_status()
        async for _part in events.aiter_raw():
            break


async def upload(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/files", files={"file": ("a", b"{}\n")}, data={"purpose": "batch"})
    file_id = answer.raise_for_status().json()["id"]
    (await client.get(f"/v1/files/{file_id}/content")).raise_for_status()


async def constrain(client: httpx.AsyncClient) -> None:
    """A grammar that nobody has asked for before."""
    choice = json.dumps(random.random())
    job = {"model": MODEL, "prompt": "mine", "params": {"structured_output": {"choices": [choice]}, "max_tokens": 8}}
    (await client.post("/v1/jobs", json=job)).raise_for_status()


async def tokenize(client: httpx.AsyncClient) -> None:
    (await client.post("/tokenize", json={"model": MODEL, "prompt": "mine " * 600})).raise_for_status()


async def list_jobs(client: httpx.AsyncClient) -> None:
    (await client.get("/v1/jobs")).raise_for_status()


async def send_large(client: httpx.AsyncClient) -> None:
    job = {"model": MODEL, "prompt": "a", "metadata": {"a": "b"}, "params": {"stop": ["x" * 100] * 4, "max_tokens": 1}}
    content = json.dumps(job).encode() + b" " * 70_000
    (await client.post("/v1/jobs", content=content, headers=JSON)).raise_for_status()


#: One operation of each kind, which another tenant expects to work whatever goes on. Each raises HTTPStatusError.
OPERATIONS: list[Callable[[httpx.AsyncClient], Awaitable[None]]] = [
    submit,
    read_back,
    stream,
    upload,
    constrain,
    tokenize,
    list_jobs,
    send_large,
]
