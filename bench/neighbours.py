"""What bench/noisy_neighbour.py times and what the neighbour does meanwhile: a table of kinds of work and noise.

The noise is made by a process of its own, `python -m bench.neighbours KIND URL`, with the neighbour's key in
CELERIAC_API_KEY: making its requests is work, which must not delay those that are timed.
"""

import asyncio
import json
import os
import random
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import httpx

from bench.tenants import (
    MODEL,
    NUM_SLOTS,
    SECOND_MODEL,
    UNSERVED_MODEL,
    job_body,
    submit,
    submit_many,
    timed,
    wait_for_ends,
    waits,
)

NUM_NOISY_JOBS = 500
LONG, SHORT = 150, 5  # tokens of a job; 3 s and 0.1 s of a slot
NOISE_TOKENS = 400

Work = Callable[[httpx.AsyncClient], Awaitable[list[float]]]
Noise = Callable[[httpx.AsyncClient], Awaitable[None]]


async def jobs_of(client: httpx.AsyncClient, num_tokens: int, **options: Any) -> list[float]:
    """The waits of five jobs that are submitted together."""
    return waits(await wait_for_ends(client, await submit_many(client, 5, num_tokens, **options)))


async def short_jobs(client: httpx.AsyncClient) -> list[float]:
    return await jobs_of(client, SHORT)


async def long_jobs(client: httpx.AsyncClient) -> list[float]:
    return await jobs_of(client, LONG)


async def jobs_of_a_second_model(client: httpx.AsyncClient) -> list[float]:
    return await jobs_of(client, LONG, model=SECOND_MODEL)


async def streams(client: httpx.AsyncClient) -> list[float]:
    """Times from the request to the first text, of streamed chats one after the other: of more than there are slots,
    since each may have taken one for good."""
    return [await timed(lambda: first_text(client)) for _ in range(NUM_SLOTS + 2)]


async def first_text(client: httpx.AsyncClient) -> None:
    async with client.stream("POST", "/v1/chat/completions", json=chat_body(SHORT)) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if '"content":"' in line.replace(" ", "") and '"content":""' not in line.replace(" ", ""):
                return
    raise AssertionError("the stream had no text")


def chat_body(num_tokens: int) -> dict[str, object]:
    messages = [{"role": "user", "content": str(random.random())}]
    return {"model": MODEL, "messages": messages, "max_tokens": num_tokens, "stream": True}


async def files(client: httpx.AsyncClient) -> list[float]:
    """Times of three uploads, each read back."""
    return [await timed(lambda: upload_and_read(client)) for _ in range(3)]


async def upload_and_read(client: httpx.AsyncClient) -> None:
    file_id = await _upload(client, b"{}\n" * 100)
    (await client.get(f"/v1/files/{file_id}/content")).raise_for_status()


async def _upload(client: httpx.AsyncClient, content: bytes) -> str:
    answer = await client.post("/v1/files", files={"file": ("a.jsonl", content)}, data={"purpose": "batch"})
    return str(answer.raise_for_status().json()["id"])


async def grammars(client: httpx.AsyncClient) -> list[float]:
    """Times of three submissions, each with a grammar that nobody has asked for before."""
    return [await timed(lambda: _constrained(client)) for _ in range(3)]


async def _constrained(client: httpx.AsyncClient) -> None:
    await submit(client, 20, model=UNSERVED_MODEL, structured_output={"choices": [f"{random.randrange(10**9)}"]})


async def batches(client: httpx.AsyncClient) -> list[float]:
    """The time from a batch of five lines to its end."""
    return [await timed(lambda: _run_batch(client, 5, SHORT))]


async def _run_batch(client: httpx.AsyncClient, num_lines: int, num_tokens: int) -> None:
    batch_id = await start_batch(client, num_lines, num_tokens)
    while True:
        answer = await client.get(f"/v1/batches/{batch_id}")
        if answer.raise_for_status().json()["status"] in ("completed", "failed", "expired", "cancelled"):
            return
        await asyncio.sleep(0.05)


async def start_batch(client: httpx.AsyncClient, num_lines: int, num_tokens: int) -> str:
    url = "/v1/completions"
    bodies = [{"model": MODEL, "prompt": str(random.random()), "max_tokens": num_tokens} for _ in range(num_lines)]
    lines = [
        json.dumps({"custom_id": str(number), "method": "POST", "url": url, "body": body})
        for number, body in enumerate(bodies)
    ]
    file_id = await _upload(client, "\n".join(lines).encode())
    batch = {"input_file_id": file_id, "endpoint": url, "completion_window": "24h"}
    return str((await client.post("/v1/batches", json=batch)).raise_for_status().json()["id"])


async def polls(client: httpx.AsyncClient) -> list[float]:
    """Times from three submissions, one after the other, to the answers of the polls that wait for their ends."""

    async def run_one() -> None:
        await wait_for_ends(client, [await submit(client, SHORT)])

    return [await timed(run_one) for _ in range(3)]


async def embeddings(client: httpx.AsyncClient) -> list[float]:
    async def embed_one() -> None:
        (await _embed(client, 1)).raise_for_status()

    return [await timed(embed_one) for _ in range(NUM_SLOTS + 2)]


async def _embed(client: httpx.AsyncClient, num_inputs: int) -> httpx.Response:
    inputs = [str(random.random()) for _ in range(num_inputs)]
    return await client.post("/v1/embeddings", json={"model": MODEL, "input": inputs})


async def webhooks(client: httpx.AsyncClient) -> list[float]:
    """Times from three submissions, one after the other, to the webhooks of their ends."""
    came = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        await writer.drain()
        writer.close()
        came.set()

    async def run_one(url: str) -> None:
        came.clear()
        (await _submit_with_webhook(client, MODEL, url)).raise_for_status()
        await came.wait()

    async with receiver(answer) as url:
        return [await timed(lambda: run_one(url)) for _ in range(3)]


@asynccontextmanager
async def receiver(on_connection: Callable[..., Awaitable[None]]) -> AsyncIterator[str]:
    """A server, and its URL. Webhooks go to names only."""
    async with await asyncio.start_server(on_connection, "127.0.0.1", 0) as server:
        yield f"http://localhost:{server.sockets[0].getsockname()[1]}/"


async def _submit_with_webhook(client: httpx.AsyncClient, model: str, url: str) -> httpx.Response:
    return await client.post("/v1/jobs", json=job_body(SHORT, model=model) | {"webhook": url})


# What the neighbour does meanwhile, besides its 500 long jobs.


async def nothing(client: httpx.AsyncClient) -> None:
    await asyncio.Event().wait()


async def at_once(number: int, act: Callable[[], Awaitable[object]]) -> None:
    """The same over and over, `number` of them at a time. Refusals are answers, too."""

    async def repeat() -> None:
        while True:
            try:
                await act()
            except httpx.TransportError:
                await asyncio.sleep(0.1)

    await asyncio.gather(*(repeat() for _ in range(number)))


async def noise_of_streams(client: httpx.AsyncClient) -> None:
    """Two hundred open streams, and as many again as fast as they are refused or end."""

    async def read() -> None:
        async with client.stream("POST", "/v1/chat/completions", json=chat_body(NOISE_TOKENS)) as answer:
            async for _part in answer.aiter_raw():
                pass
        await asyncio.sleep(0.1)

    await at_once(200, read)


async def noise_of_files(client: httpx.AsyncClient) -> None:
    async def send() -> None:
        form = {"file": ("a", b"x" * 1_000_000)}
        answer = await client.post("/v1/files", files=form, data={"purpose": "batch"})
        if answer.status_code == 200:
            await client.delete(f"/v1/files/{answer.json()['id']}")
        await asyncio.sleep(0.01)

    await at_once(12, send)


async def noise_of_grammars(client: httpx.AsyncClient) -> None:
    async def send() -> None:
        schema = {"type": "object", "properties": {str(random.random()): {"enum": [random.random()]}}}
        output = {"json_schema": schema}
        await client.post("/v1/jobs", json=job_body(20, model=UNSERVED_MODEL, structured_output=output))

    await at_once(12, send)


async def noise_of_polls(client: httpx.AsyncClient) -> None:
    """Long polls of jobs that wait, 400 of them open."""
    job_ids = cycle(await _queued(client))

    async def poll() -> None:
        answer = await client.get(f"/v1/jobs/{next(job_ids)}", params={"wait": 60})
        await asyncio.sleep(0.1 if answer.status_code != 200 else 0)

    await at_once(400, poll)


async def _queued(client: httpx.AsyncClient) -> list[str]:
    page = await client.get("/v1/jobs", params={"status": "queued", "limit": 100})
    return [job["id"] for job in page.raise_for_status().json()["data"]]


async def noise_of_reconnects(client: httpx.AsyncClient) -> None:
    """Readers of one job's log that hang up at its first event and come back at once."""
    job_id = await submit(client, NOISE_TOKENS, priority=10)

    async def read() -> None:
        async with client.stream("GET", f"/v1/jobs/{job_id}/events") as answer:
            async for _part in answer.aiter_raw():
                break

    await at_once(32, read)


async def noise_of_webhooks(client: httpx.AsyncClient) -> None:
    """Ends of jobs, as many as can be, whose webhooks hang."""

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    async with receiver(hang) as url:

        async def end_one() -> None:
            answer = await _submit_with_webhook(client, UNSERVED_MODEL, url)
            await client.post(f"/v1/jobs/{answer.json()['id']}/cancel")

        await at_once(8, end_one)


async def noise_of_cancels(client: httpx.AsyncClient) -> None:
    """Jobs that are cancelled as soon as they are accepted."""

    async def cancel_one() -> None:
        answer = await client.post("/v1/jobs", json=job_body(NOISE_TOKENS, priority=10))
        if answer.status_code == 202:
            await client.post(f"/v1/jobs/{answer.json()['id']}/cancel")

    await at_once(16, cancel_one)


async def noise_of_hits(client: httpx.AsyncClient) -> None:
    """One question whose answer is known, asked as often as it is answered."""
    body = job_body(SHORT, priority=10, temperature=0.0)
    first = await client.post("/v1/jobs", json=body)
    await wait_for_ends(client, [first.raise_for_status().json()["id"]])
    again = await client.post("/v1/jobs", json=body)
    assert again.headers["x-celeriac-cache"] == "hit", again.text
    await at_once(32, lambda: client.post("/v1/jobs", json=body))


async def noise_of_embeddings(client: httpx.AsyncClient) -> None:
    await at_once(32, lambda: _embed(client, 64))


async def noise_of_large_embeddings(client: httpx.AsyncClient) -> None:
    """As much text as fits into a request: a thousand steps of the engine beside texts."""
    body = {"model": MODEL, "input": [[65] * 240] * 1_200}
    await at_once(8, lambda: client.post("/v1/embeddings", json=body))


async def noise_of_sequences(client: httpx.AsyncClient) -> None:
    """Jobs of which each takes all slots."""
    await submit_many(client, 100, NOISE_TOKENS, n=NUM_SLOTS)
    await asyncio.Event().wait()


async def noise_of_batches(client: httpx.AsyncClient) -> None:
    await start_batch(client, NUM_NOISY_JOBS, NOISE_TOKENS)
    await asyncio.Event().wait()


async def noise_of_a_large_batch(client: httpx.AsyncClient) -> None:
    """From its upload on, since reading its lines is work, too."""
    await start_batch(client, 50_000, NOISE_TOKENS)
    await asyncio.Event().wait()


@dataclass(frozen=True, slots=True)
class Kind:
    """Work that is timed, and what the neighbour does meanwhile."""

    work: Work
    noise: Noise = nothing
    num_queued: int = NUM_NOISY_JOBS  # long jobs that the neighbour has waiting besides; a batch would wait for them
    settle_seconds: float = 4.0  # until the noise does what it can
    begins: str = "SELECT true"  # true once it does


ARE_EMBEDDED = f"SELECT count(*) >= {NUM_SLOTS} FROM jobs WHERE kind = 'embedding' AND status = 'in_progress'"

KINDS: dict[str, Kind] = {
    "short jobs": Kind(short_jobs),
    "long jobs": Kind(long_jobs),
    "streams": Kind(streams, noise_of_streams),
    "files": Kind(files, noise_of_files),
    "grammars": Kind(grammars, noise_of_grammars),
    "polls": Kind(polls, noise_of_polls),
    "embeddings": Kind(embeddings, noise_of_embeddings),
    "streams beside reconnects": Kind(streams, noise_of_reconnects),
    "short jobs beside cancels": Kind(short_jobs, noise_of_cancels),
    "polls beside hits": Kind(polls, noise_of_hits),
    "webhooks": Kind(webhooks, noise_of_webhooks),
    "a second model": Kind(jobs_of_a_second_model),
    "batches": Kind(batches, noise_of_batches, num_queued=0),
    "batches beside 50,000 lines": Kind(batches, noise_of_a_large_batch, num_queued=0, settle_seconds=25.0),
    "polls beside 50,000 lines": Kind(polls, noise_of_a_large_batch, num_queued=0),
    "embeddings beside large ones": Kind(embeddings, noise_of_large_embeddings, num_queued=0, begins=ARE_EMBEDDED),
    "streams beside large embeddings": Kind(streams, noise_of_large_embeddings, num_queued=0, begins=ARE_EMBEDDED),
    "short jobs beside n=4": Kind(short_jobs, noise_of_sequences, num_queued=0),
}


async def make_noise(name: str, url: str) -> None:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    headers = {"authorization": f"Bearer {os.environ['CELERIAC_API_KEY']}"}
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=120, limits=limits) as client:
        await KINDS[name].noise(client)


if __name__ == "__main__":
    asyncio.run(make_noise(*sys.argv[1:]))
