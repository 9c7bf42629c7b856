"""Measures what a tenant notices of one that pushes at each route in turn: `python -m bench.every_route`.

The whole system with a fake engine of few slots. One tenant floods one route with dozens of clients, each of which asks
again as soon as it is answered (bench/flood.py); the routes are those of the OpenAPI document, and what it does not
tell (bench/route_pushes.py). The other tenant runs short jobs, opens streams, reads and uploads, one after the other.
The ceiling is the other tenant alone. Prints a line for each flood, then all of them with the worst first, then one
JSON line. A 95th percentile of more than twice that alone plus FAULT_SECONDS is a fault, as is any refusal of the
gentle tenant's, and any answer of 500; one of more than LOOK times that alone is worth a look.

`--only 'GET /v1/jobs' 'idle'` floods what begins with one of these. All of it takes half an hour.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx

from bench.flood import Push, filled
from bench.histograms import histogram, quantile
from bench.neighbours import SHORT, first_text, upload_and_read
from bench.noisy_neighbour import empty
from bench.route_pushes import FIXED, LINES, THINGS, further_pushes, pushes_of
from bench.tenants import (
    MODEL,
    SECOND_MODEL,
    TenantSystem,
    machine,
    percentile,
    running_system,
    submit,
    timed,
    wait_for_ends,
)
from tests.waiting import wait_until_async

FAULT_SECONDS = 5.0
LOOK = 5.0
LEAST_SECONDS = 0.02  # of a time alone: a multiple of less tells about the machine
WARM_SECONDS = 1.0
PAUSE_SECONDS = 0.05
MIN_ROUNDS = 3
SETTINGS = {"max_queued_jobs": 200, "webhook_private_targets": True}
NOTHING = "nothing"
LAG = "celeriac_event_loop_lag_seconds"
CANCEL_BATCHES = (
    "UPDATE batches SET status = 'cancelling', cancelling_at = now() WHERE status IN ('validating', 'in_progress')"
)
UNFINISHED_BATCHES = "SELECT 1 FROM batches WHERE status NOT IN ('completed', 'failed', 'expired', 'cancelled') LIMIT 1"

Seconds = dict[str, list[float]]


async def run_job(client: httpx.AsyncClient) -> None:
    await wait_for_ends(client, [await submit(client, SHORT)])


async def read(client: httpx.AsyncClient) -> None:
    page = (await client.get("/v1/jobs", params={"limit": 5})).raise_for_status().json()
    (await client.get(f"/v1/jobs/{page['data'][0]['id']}")).raise_for_status()


OPERATIONS: dict[str, Callable[[httpx.AsyncClient], Awaitable[None]]] = {
    "job": run_job,
    "stream": first_text,
    "read": read,
    "upload": upload_and_read,
}


async def gentle(client: httpx.AsyncClient, seconds: float) -> tuple[Seconds, list[str]]:
    """The times of each operation, one after the other, and what was refused."""
    times: Seconds = {name: [] for name in OPERATIONS}
    refused: list[str] = []
    ends_at = time.monotonic() + seconds
    while time.monotonic() < ends_at or len(times["upload"]) + len(refused) < MIN_ROUNDS:
        for name, operation in OPERATIONS.items():
            try:
                times[name].append(await timed(lambda operation=operation: operation(client)))  # type: ignore[misc]
            except (httpx.HTTPError, RuntimeError) as exc:
                refused.append(f"{name}: {exc}"[:300])
            await asyncio.sleep(PAUSE_SECONDS)
    return times, refused


@dataclass(slots=True)
class Flooded:
    """What a flood did."""

    answers: Mapping[str, int]
    failed: str | None = None


@asynccontextmanager
async def flooding(url: str, key: str, push: Push) -> AsyncIterator[Flooded]:
    flooded = Flooded({})
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bench.flood", url),
        env=os.environ | {"CELERIAC_API_KEY": key},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None
    process.stdin.write(push.dumped().encode() + b"\n")
    await process.stdin.drain()
    try:
        await asyncio.sleep(WARM_SECONDS)
        yield flooded
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        output, _ = await process.communicate()
    told = json.loads(output.splitlines()[-1])
    flooded.answers, flooded.failed = told["answers"], told["failed"]


async def make_things(client: httpx.AsyncClient) -> dict[str, str]:
    """One of each that a path can name, and a large file."""
    values = dict(FIXED)
    for name in THINGS:
        await make_thing(client, name, values)
    content = LINES.encode() + b"\n" * 20_000_000
    large = await client.post("/v1/files", files={"file": ("a", content)}, data={"purpose": "batch"})
    if large.is_error:
        raise RuntimeError(f"the large file was not made: {large.status_code} {large.text}")
    return values | {"large_file_id": large.json()["id"]}


async def make_thing(client: httpx.AsyncClient, name: str, values: dict[str, str]) -> None:
    """Puts its id into `values`."""
    for step in THINGS[name]:
        own = values | {"unique": str(random.random())}
        headers = {"content-type": "application/json"} | step.headers
        answer = await client.request(
            step.method, filled(step.path, own), content=filled(step.body or "", own), headers=headers
        )
        if answer.is_error:
            raise RuntimeError(f"{name} was not made: {answer.status_code} {answer.text}")
        if step.gives:
            values[step.gives] = str(answer.json()["id"])


@dataclass(slots=True)
class Bench:
    system: TenantSystem
    noisy: httpx.AsyncClient  # with a key that may do everything
    gentle: httpx.AsyncClient
    seconds: float
    alone: Seconds
    values: dict[str, str]  # of the noisy tenant's things

    async def flood(self, name: str, push: Push | None) -> dict[str, Any]:
        """`push` may be nothing, to compare."""
        for ended in ("job_id", "response_id"):  # by the clearing after the last flood
            await make_thing(self.noisy, ended, self.values)
        memory = await asyncio.to_thread(self.system.memory_mib)
        before, began_at = self.system.cpu_seconds(), time.monotonic()
        lags = await histogram(self.noisy, LAG)
        if push is None:
            flooded = Flooded({})
            times, refused = await gentle(self.gentle, self.seconds)
        else:
            key = self.noisy.headers["authorization"].removeprefix("Bearer ")
            async with flooding(str(self.noisy.base_url), key, replace(push, values=self.values)) as flooded:
                times, refused = await gentle(self.gentle, self.seconds)
        after, seconds = self.system.cpu_seconds(), time.monotonic() - began_at
        late = quantile(lags, await histogram(self.noisy, LAG), 0.99)
        await self.clear()
        grown = await asyncio.to_thread(self.system.memory_mib)
        return self.compared(name, times, refused, flooded) | {
            "cores": {part: round((after[part] - before[part]) / seconds, 2) for part in after},
            "loop_late_p99_ms": round(1000 * late),
            "memory_mib": {part: [memory[part], grown[part]] for part in memory},
        }

    async def clear(self) -> None:
        """Nothing of a flood may be left when the next one begins."""
        with self.system.plant.connect() as connection:
            connection.execute(CANCEL_BATCHES)
        await empty(self.system, self.noisy)
        await wait_until_async(lambda: not self.system.rows(UNFINISHED_BATCHES), "the batches have ended", seconds=120)
        await asyncio.sleep(WARM_SECONDS)

    def compared(self, name: str, times: Seconds, refused: list[str], flooded: Flooded) -> dict[str, Any]:
        figures: dict[str, Any] = {}
        for operation, seconds in times.items():
            alone = percentile(self.alone[operation] or seconds, 0.95)
            beside = percentile(seconds, 0.95) if seconds else 600.0
            figures[operation] = {
                "alone_p95_s": round(alone, 3),
                "p50_s": round(statistics.median(seconds), 3) if seconds else None,
                "p95_s": round(beside, 3),
                "times": round(beside / max(alone, LEAST_SECONDS), 1),
                "is_fault": beside > 2 * alone + FAULT_SECONDS,
            }
        failures = [status for status in flooded.answers if status.startswith("5") and status[:3] not in ("503", "529")]
        return {
            "kind": name,
            "worst": max(one["times"] for one in figures.values()),
            "is_fault": any(one["is_fault"] for one in figures.values()) or bool(refused or failures or flooded.failed),
            "operations": figures,
            "refused": refused[:5],
            "num_refused": len(refused),
            "answers": dict(sorted(flooded.answers.items())),
            "failed": flooded.failed,
        }


def show(figures: Mapping[str, Any]) -> None:
    operations = "; ".join(f"{name} {one['p95_s']:.3f} ({one['times']})" for name, one in figures["operations"].items())
    mark = "FAULT" if figures["is_fault"] else "look" if figures["worst"] > LOOK else ""
    busy = {part: share for part, share in figures["cores"].items() if share >= 0.1}
    grown = {
        part: round(after - before) for part, (before, after) in figures["memory_mib"].items() if after - before > 8
    }
    print(
        f"{figures['kind']:48} {mark:5} {operations}; answers {figures['answers']}; cores {busy}; "
        f"loop late {figures['loop_late_p99_ms']} ms; MiB more {grown}"
    )
    for refusal in figures["refused"]:
        print(f"    refused: {refusal}")
    if figures["failed"]:
        print(f"    the flood failed: {figures['failed']}")
    sys.stdout.flush()


async def run(system: TenantSystem, given: argparse.Namespace) -> dict[str, Any]:
    async with system.tenants["noisy"].client() as noisy, system.tenants["quiet"].client() as quiet:
        noisy.headers["authorization"] = f"Bearer {system.admin_key('noisy')}"
        document = (await quiet.get("/openapi.json")).raise_for_status().json()
        pushes = pushes_of(document) | further_pushes()
        only = given.only or [""]
        chosen = {name: pushes[name] for first in only for name in pushes if name.startswith(first)}
        for job in range(20):
            await submit(quiet, 1 + job % 2)
        await gentle(quiet, WARM_SECONDS)
        alone, _ = await gentle(quiet, 2 * given.seconds)
        bench = Bench(system, noisy, quiet, given.seconds, alone, await make_things(noisy))
        kinds = []
        for name, push in {f"{NOTHING}, before": None, **chosen, f"{NOTHING}, after": None}.items():
            try:
                kinds.append(await bench.flood(name, push))
            except (httpx.HTTPError, RuntimeError) as exc:
                print(f"{name:48} could not be tried: {exc!r}"[:400], flush=True)
                continue
            show(kinds[-1])
    return {"kinds": sorted(kinds, key=lambda one: (not one["is_fault"], -one["worst"]))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="ROUTE", help="those that begin with one of these")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each flood")
    given = parser.parse_args()
    print(machine())
    os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"  # what is pulled is not there
    folder = Path(tempfile.mkdtemp(prefix="celeriac-bench-"))
    try:
        weights = {"noisy": 1.0, "quiet": 1.0}
        with running_system(folder, weights, settings=SETTINGS, served=(MODEL, SECOND_MODEL)) as system:
            figures = asyncio.run(run(system, given))
            errors = [line for part in system.plant.parts for line in part.log().splitlines() if "ERROR" in line]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print("\nthe worst first:")
    for one in figures["kinds"]:
        show(one)
    result = {"bench": "every_route", "machine": machine(), **figures, "errors": errors[:5], "num_errors": len(errors)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
