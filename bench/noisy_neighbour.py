"""Measures what a tenant notices of a neighbour that takes all it can: `python -m bench.noisy_neighbour`.

The whole system with a fake engine of few slots. Every kind of work (bench/neighbours.py) is timed alone and beside 500
long jobs of another tenant, which also does as much as it can of the same or another kind; then how evenly ten tenants
share, how exactly three share by weight, and whether an urgent job comes before the lower ones of its own tenant. The
ceiling is the tenant alone. What tenants receive is tokens, those of prompts as well: a tenant of short jobs gets a
larger part of its share in prompts. Prints the ratios, then one JSON line. The aims: a 95th percentile of at most twice
that alone plus CHUNK_SECONDS, an index of Jain of 0.95, shares within 5 %.

`--only weights` takes forty seconds, `--only lengths` two minutes: the same with long jobs, which are paused in turns,
and with long beside short ones. `--only kinds` takes six minutes, with `--kind polls` half of one.
"""

import argparse
import asyncio
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from itertools import repeat
from pathlib import Path
from typing import Any

import httpx

from bench.neighbours import KINDS, NOISE_TOKENS, SHORT, Work
from bench.tenants import (
    MODEL,
    NUM_SLOTS,
    SECOND_MODEL,
    STEP_SECONDS,
    BenchTenant,
    TenantSystem,
    cancel_all,
    machine,
    parsed,
    percentile,
    running_system,
    submit,
    submit_many,
    wait_for_ends,
)
from tests.waiting import wait_until_async

CHUNK_SECONDS = 5.0  # on top of twice the time alone: until a running job has given up its slot
SETTLE_SECONDS = 3.0  # until those that came first have no lead any more
WEIGHTS = {"light": 1.0, "middle": 2.0, "heavy": 4.0}
SETTINGS = {"webhook_private_targets": True, "response_cache": "greedy"}
EQUALS = [f"equal-{number}" for number in range(10)]


async def repeated(work: Work, client: httpx.AsyncClient, num_rounds: int) -> list[float]:
    return [seconds for _ in range(num_rounds) for seconds in await work(client)]


@asynccontextmanager
async def going_on(system: TenantSystem, name: str, neighbour: BenchTenant) -> AsyncIterator[None]:
    """The neighbour's noise. It must go on until the end."""
    environment = os.environ | {"CELERIAC_API_KEY": neighbour.key}
    arguments = ["-m", "bench.neighbours", name, neighbour.url]
    process = await asyncio.create_subprocess_exec(sys.executable, *arguments, env=environment)
    try:
        await wait_until_async(lambda: system.rows(KINDS[name].begins) == [(True,)], "the noise is on", seconds=60)
        await asyncio.sleep(KINDS[name].settle_seconds)
        yield
        if process.returncode is not None:
            raise RuntimeError(f"the noise {name!r} has ended with {process.returncode}")
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


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
        f"{name:27} alone p95 {figures['alone_p95_s']:6} s; beside the neighbour p50 {figures['noisy_p50_s']:6} s, "
        f"p95 {figures['noisy_p95_s']:6} s; limit {figures['limit_s']:6} s",
        flush=True,
    )
    return figures


async def measure_kinds(system: TenantSystem, names: Sequence[str], num_rounds: int) -> list[dict[str, object]]:
    """Each kind of work is timed alone once, before there is any neighbour."""
    compares = []
    neighbour = system.tenants["noisy"]
    async with neighbour.client() as noisy, system.tenants["quiet"].client() as quiet:
        works = dict.fromkeys(KINDS[name].work for name in names)
        alone = {work: await repeated(work, quiet, num_rounds) for work in works}
        for name in names:
            kind = KINDS[name]
            await submit_many(noisy, max(0, kind.num_queued - await num_queued(system)), NOISE_TOKENS)
            if not kind.num_queued:
                await empty(system, noisy)
            async with going_on(system, name, neighbour):
                compares.append(compared(name, alone[kind.work], await repeated(kind.work, quiet, num_rounds)))
        await empty(system, noisy)
    return compares


async def num_queued(system: TenantSystem) -> int:
    """Jobs that wait for the model."""
    [(counted,)] = system.rows("SELECT count(*) FROM jobs WHERE status = 'queued' AND model = %s", MODEL)
    return int(counted)


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
    return {"kinds": await measure_kinds(system, given.kind or list(KINDS), given.rounds)}


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
    parser.add_argument("--kind", action="append", choices=list(KINDS), help="with --only kinds: these [default: all]")
    parser.add_argument("--rounds", type=int, default=3, help="of each kind of work, alone and beside the neighbour")
    parser.add_argument("--only", choices=list(PARTS), help="one part instead of all")
    parser.add_argument("--seconds", type=float, default=25.0, help="over which shares are measured")
    given = parser.parse_args()
    print(f"{machine()}; {NUM_SLOTS} slots")
    folder = Path(tempfile.mkdtemp(prefix="celeriac-bench-"))
    weights = {"noisy": 1.0, "quiet": 1.0} | dict.fromkeys(EQUALS, 1.0) | WEIGHTS
    try:
        with running_system(folder, weights, settings=SETTINGS, served=(MODEL, SECOND_MODEL)) as system:
            figures = asyncio.run(run(system, given))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps({"bench": "noisy_neighbour", "machine": machine(), **figures}))


if __name__ == "__main__":
    main()
