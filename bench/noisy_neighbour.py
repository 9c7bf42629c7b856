"""Measures what a tenant notices of a neighbour that takes all it can: `python -m bench.noisy_neighbour`.

The whole system with a fake engine of few slots. Every kind of work is timed alone and beside 500 long jobs of another
tenant, which also does as much as it can of the same kind; then how evenly ten tenants share, how exactly three share
by weight, and whether an urgent job comes before the lower ones of its own tenant. The ceiling is the tenant alone.
What tenants receive is tokens, those of prompts as well: a tenant of short jobs gets a larger part of its share in
prompts. Prints the ratios, then one JSON line. The aims: a 95th percentile of at most twice that alone plus
CHUNK_SECONDS, an index of Jain of 0.95, shares within 5 %.

`--only weights` takes forty seconds, `--only lengths` two minutes: the same with long jobs, which are paused in turns,
and with long beside short ones.
"""

import argparse
import asyncio
import json
import random
import shutil
import statistics
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from itertools import repeat
from pathlib import Path
from typing import Any

import httpx

from bench.tenants import (
    MODEL,
    NUM_SLOTS,
    STEP_SECONDS,
    UNSERVED_MODEL,
    TenantSystem,
    cancel_all,
    job_body,
    machine,
    parsed,
    percentile,
    running_system,
    submit,
    submit_many,
    timed,
    wait_for_ends,
    waits,
)

CHUNK_SECONDS = 5.0  # on top of twice the time alone: until a running job has given up its slot
NUM_NOISY_JOBS = 500
LONG, SHORT = 150, 5  # tokens of a job; 3 s and 0.1 s of a slot
NOISE_TOKENS = 400
SETTLE_SECONDS = 3.0  # until those that came first have no lead any more
WEIGHTS = {"light": 1.0, "middle": 2.0, "heavy": 4.0}
EQUALS = [f"equal-{number}" for number in range(10)]

Work = Callable[[httpx.AsyncClient], Awaitable[list[float]]]


async def jobs_of(client: httpx.AsyncClient, num_tokens: int) -> list[float]:
    """The waits of five jobs that are submitted together."""
    return waits(await wait_for_ends(client, await submit_many(client, 5, num_tokens)))


async def short_jobs(client: httpx.AsyncClient) -> list[float]:
    return await jobs_of(client, SHORT)


async def long_jobs(client: httpx.AsyncClient) -> list[float]:
    return await jobs_of(client, LONG)


async def streams(client: httpx.AsyncClient) -> list[float]:
    """Times from the request to the first text, of three streamed chats one after the other."""
    return [await timed(lambda: _first_text(client)) for _ in range(3)]


async def _first_text(client: httpx.AsyncClient) -> None:
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
    return [await timed(lambda: _upload_and_read(client)) for _ in range(3)]


async def _upload_and_read(client: httpx.AsyncClient) -> None:
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


# What the neighbour does meanwhile, besides its 500 long jobs.


async def noise_of_nothing(client: httpx.AsyncClient) -> None:
    await asyncio.Event().wait()


async def noise_of_streams(client: httpx.AsyncClient) -> None:
    """Two hundred open streams, and as many again as fast as they are refused or end."""

    async def read() -> None:
        while True:
            async with client.stream("POST", "/v1/chat/completions", json=chat_body(NOISE_TOKENS)) as answer:
                async for _part in answer.aiter_raw():
                    pass
            await asyncio.sleep(0.1)

    await asyncio.gather(*(read() for _ in range(200)))


async def noise_of_files(client: httpx.AsyncClient) -> None:
    async def send() -> None:
        while True:
            form = {"file": ("a", b"x" * 1_000_000)}
            answer = await client.post("/v1/files", files=form, data={"purpose": "batch"})
            if answer.status_code == 200:
                await client.delete(f"/v1/files/{answer.json()['id']}")
            await asyncio.sleep(0.01)

    await asyncio.gather(*(send() for _ in range(12)))


async def noise_of_grammars(client: httpx.AsyncClient) -> None:
    async def send() -> None:
        while True:
            schema = {"type": "object", "properties": {str(random.random()): {"enum": [random.random()]}}}
            output = {"json_schema": schema}
            await client.post("/v1/jobs", json=job_body(20, model=UNSERVED_MODEL, structured_output=output))

    await asyncio.gather(*(send() for _ in range(12)))


async def noise_of_batches(client: httpx.AsyncClient) -> None:
    await start_batch(client, NUM_NOISY_JOBS, NOISE_TOKENS)
    await asyncio.Event().wait()


KINDS: dict[str, tuple[Work, Callable[[httpx.AsyncClient], Awaitable[None]]]] = {
    "short jobs": (short_jobs, noise_of_nothing),
    "long jobs": (long_jobs, noise_of_nothing),
    "streams": (streams, noise_of_streams),
    "files": (files, noise_of_files),
    "grammars": (grammars, noise_of_grammars),
}


async def repeated(work: Work, client: httpx.AsyncClient, num_rounds: int) -> list[float]:
    return [seconds for _ in range(num_rounds) for seconds in await work(client)]


@asynccontextmanager
async def going_on(noise: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
    task = asyncio.ensure_future(noise())
    await asyncio.sleep(2.0)  # let it take what it can
    try:
        yield
    finally:
        task.cancel()
        [outcome] = await asyncio.gather(task, return_exceptions=True)
        if isinstance(outcome, Exception):
            raise outcome


def compared(name: str, alone: Sequence[float], noisy: Sequence[float]) -> dict[str, object]:
    limit = 2 * percentile(alone, 0.95) + CHUNK_SECONDS
    figures = {
        "kind": name,
        "alone_p95_s": round(percentile(alone, 0.95), 3),
        "noisy_p50_s": round(statistics.median(noisy), 3),
        "noisy_p95_s": round(percentile(noisy, 0.95), 3),
        "limit_s": round(limit, 3),
        "is_kept": percentile(noisy, 0.95) <= limit,
    }
    print(
        f"{name:12} alone p95 {figures['alone_p95_s']:6} s; beside the neighbour p50 {figures['noisy_p50_s']:6} s, "
        f"p95 {figures['noisy_p95_s']:6} s; limit {figures['limit_s']:6} s",
        flush=True,
    )
    return figures


async def measure_kinds(system: TenantSystem, num_rounds: int) -> list[dict[str, object]]:
    compares = []
    async with system.tenants["noisy"].client() as noisy, system.tenants["quiet"].client() as quiet:
        alone = {name: await repeated(work, quiet, num_rounds) for name, (work, _) in KINDS.items()}
        alone["batches"] = await repeated(batches, quiet, num_rounds)
        await submit_many(noisy, NUM_NOISY_JOBS, NOISE_TOKENS)
        for name, (work, noise) in KINDS.items():
            async with going_on(lambda noise=noise: noise(noisy)):  # type: ignore[misc]
                compares.append(compared(name, alone[name], await repeated(work, quiet, num_rounds)))
        await empty(system, noisy)
        async with going_on(lambda: noise_of_batches(noisy)):
            compares.append(compared("batches", alone["batches"], await repeated(batches, quiet, num_rounds)))
        await empty(system, noisy)
    return compares


async def empty(system: TenantSystem, client: httpx.AsyncClient) -> None:
    """Cancel all that the tenant has left."""
    for batch in (await client.get("/v1/batches")).raise_for_status().json()["data"]:
        if batch["status"] in ("validating", "in_progress"):
            await client.post(f"/v1/batches/{batch['id']}/cancel")
    while job_ids := await unfinished(client):
        await cancel_all(client, job_ids)


async def unfinished(client: httpx.AsyncClient) -> list[str]:
    found = []
    for status in ("queued", "in_progress"):
        page = await client.get("/v1/jobs", params={"status": status, "limit": 100})
        found += [job["id"] for job in page.raise_for_status().json()["data"]]
    return found


async def shares(
    system: TenantSystem, lengths: Mapping[str, int], seconds: float, *, num_jobs: int = 400
) -> dict[str, int]:
    """The tokens that each receives within `seconds`, all with more waiting than they can get: jobs of these lengths by
    tenant. Prints how many of all steps they used."""
    clients = [system.tenants[name].client() for name in lengths]
    try:
        await asyncio.gather(*map(submit_many, clients, repeat(num_jobs), lengths.values()))
        await asyncio.sleep(SETTLE_SECONDS)
        before, num_before = system.tokens_by_tenant(), system.num_output_tokens()
        await asyncio.sleep(seconds)
        after, num_after = system.tokens_by_tenant(), system.num_output_tokens()
        ceiling = seconds * NUM_SLOTS / STEP_SECONDS
        print(f"{num_after - num_before} output tokens, {(num_after - num_before) / ceiling:.0%} of the ceiling")
        for client in clients:
            await empty(system, client)
    finally:
        for client in clients:
            await client.aclose()
    ids = {name: system.tenants[name].id for name in lengths}
    return {name: after[ids[name]] - before.get(ids[name], 0) for name in lengths}


def jain(values: Sequence[float]) -> float:
    return sum(values) ** 2 / (len(values) * sum(value * value for value in values))


async def urgent_first(system: TenantSystem) -> int:
    """How many jobs of lower priority start between the acceptance and the start of an urgent one of their tenant."""
    async with system.tenants["noisy"].client() as client:
        await submit_many(client, 40, 40)
        await asyncio.sleep(1.0)
        [urgent] = await wait_for_ends(client, [await submit(client, SHORT, priority=10)])
        await empty(system, client)
    [(num_before,)] = system.rows(
        "SELECT count(*) FROM jobs l JOIN jobs u USING (tenant_id) WHERE u.id = %s AND l.priority < u.priority"
        " AND l.started_at > u.created_at AND l.started_at < u.started_at",
        parsed([urgent["id"]])[0],
    )
    return int(num_before)


async def measure_equals(system: TenantSystem, given: argparse.Namespace) -> dict[str, Any]:
    lengths = {name: 10 + 5 * (number % 4) for number, name in enumerate(EQUALS)}
    tokens = await shares(system, lengths, given.seconds, num_jobs=120)
    index = round(jain(list(tokens.values())), 4)
    print(f"Jain's index over ten equal tenants: {index}", flush=True)
    return {"jain": index, "equal_tokens": list(tokens.values())}


async def measure_weights(system: TenantSystem, given: argparse.Namespace) -> dict[str, Any]:
    return await by_weight(system, "short jobs", (10, 15, 20), given.seconds, num_jobs=400)


async def measure_lengths(system: TenantSystem, given: argparse.Namespace) -> dict[str, Any]:
    """Tenants take turns of seconds at a part of a slot, so a minute is short."""
    long = await by_weight(system, "long jobs", (900, 900, 900), max(60.0, given.seconds), num_jobs=20)
    lone = await by_weight(system, "long beside short jobs", (900, 15, 20), max(60.0, given.seconds), num_jobs=500)
    return {"long": long, "long_beside_short": lone}


async def by_weight(
    system: TenantSystem, name: str, lengths: Sequence[int], seconds: float, *, num_jobs: int
) -> dict[str, Any]:
    tokens = await shares(system, dict(zip(WEIGHTS, lengths, strict=True)), seconds, num_jobs=num_jobs)
    total, total_weight = sum(tokens.values()), sum(WEIGHTS.values())
    off = {name: round(tokens[name] / total / (weight / total_weight) - 1, 3) for name, weight in WEIGHTS.items()}
    print(f"{name} by weights {WEIGHTS}: {tokens} in {seconds:.0f} s, off by {off}", flush=True)
    return {"weighted_tokens": tokens, "weighted_off": off}


async def measure_urgent(system: TenantSystem, given: argparse.Namespace) -> dict[str, Any]:
    before_urgent = [await urgent_first(system) for _ in range(3)]
    print(f"lower jobs of its own tenant that started before an urgent one: {before_urgent}", flush=True)
    return {"num_before_urgent": before_urgent}


async def measure_all_kinds(system: TenantSystem, given: argparse.Namespace) -> dict[str, Any]:
    return {"kinds": await measure_kinds(system, given.rounds)}


PARTS = {
    "kinds": measure_all_kinds,
    "equals": measure_equals,
    "weights": measure_weights,
    "lengths": measure_lengths,
    "urgent": measure_urgent,
}


async def run(system: TenantSystem, given: argparse.Namespace) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for name in [given.only] if given.only else PARTS:
        figures |= {name: await PARTS[name](system, given)}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="of each kind of work, alone and beside the neighbour")
    parser.add_argument("--only", choices=list(PARTS), help="one part instead of all")
    parser.add_argument("--seconds", type=float, default=25.0, help="over which shares are measured")
    given = parser.parse_args()
    print(f"{machine()}; {NUM_SLOTS} slots")
    folder = Path(tempfile.mkdtemp(prefix="celeriac-bench-"))
    weights = {"noisy": 1.0, "quiet": 1.0} | dict.fromkeys(EQUALS, 1.0) | WEIGHTS
    try:
        with running_system(folder, weights) as system:
            figures = asyncio.run(run(system, given))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps({"bench": "noisy_neighbour", "machine": machine(), **figures}))


if __name__ == "__main__":
    main()
