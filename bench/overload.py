"""Measures what happens under three times the load that the system can serve: `python -m bench.overload --minutes 5`.

The whole system with a fake engine of few slots, and three tenants with short queues. First the peak: as many jobs as
it serves when there is always enough to do, which is the ceiling. Then OVERLOAD times as many arrive, whatever is
answered (an open loop), for the given minutes. Then it must be as before. Prints the figures, then one JSON line.
The aims: a goodput of 95 % of the peak, refusals within 50 ms (p99), no accepted job lost or shed, memory flat. What
the load generator's own lateness and the machine add to a refusal is told by the figures of the API itself beside it.
"""

import argparse
import asyncio
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx

from bench.histograms import histogram, quantile
from bench.tenants import (
    TenantSystem,
    machine,
    percentile,
    running_system,
    submit,
    timed,
    wait_for_ends,
)
from tests.waiting import wait_until_async

OVERLOAD = 3.0
NUM_TOKENS = 10  # of each job: 0.2 s of a slot
MAX_QUEUED = 30  # jobs of a tenant; together a few seconds of work
TENANTS = {"one": 1.0, "two": 1.0, "three": 1.0}
PEAK_SECONDS = 20.0
WARM_SECONDS = 20.0  # of overload, before memory and goodput count
SAMPLE_SECONDS = 5.0
#: What the API tells of itself meanwhile: whole requests for jobs, the part of it that SQL takes, and its event loop.
TOLD: dict[str, dict[str, str]] = {
    "http_request_seconds": {"route": "/v1/jobs"},
    "jobs_accept_seconds": {},
    "event_loop_lag_seconds": {},
}
UNFINISHED = "SELECT 1 FROM jobs WHERE status IN ('queued', 'in_progress') LIMIT 1"
GROWTH = 0.1  # of memory, above which it is not flat
SLACK_MIB = 16.0


@dataclass
class Arrivals:
    """What the answers to an open loop were."""

    job_ids: dict[str, list[str]] = field(default_factory=dict)  # by tenant
    accepted: list[float] = field(default_factory=list)  # seconds until the answer
    refused: list[float] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    num_without_retry_after: int = 0
    late_seconds: list[float] = field(default_factory=list)  # of the requests, after they were due
    lags: list[float] = field(default_factory=list)  # of a timer of the load generator's

    @classmethod
    def read(cls, output: bytes) -> "Arrivals":
        """What bench/arrivals.py has printed."""
        told = json.loads(output)
        arrivals = cls(
            num_without_retry_after=told["num_without_retry_after"],
            late_seconds=told["late_seconds"],
            lags=told["lags"],
        )
        for name, answers in told["answers"].items():
            for status, seconds, job_id in answers:
                arrivals.statuses[str(status)] += 1
                if isinstance(status, str):  # an error of the connection
                    continue
                (arrivals.refused if job_id is None else arrivals.accepted).append(seconds)
                if job_id is not None:
                    arrivals.job_ids.setdefault(name, []).append(job_id)
        return arrivals


async def open_loop(system: TenantSystem, *, per_second: float, seconds: float) -> Arrivals:
    """Jobs of all tenants in turn, made by another process."""
    given = {
        "keys": {name: tenant.key for name, tenant in system.tenants.items()},
        "per_second": per_second,
        "seconds": seconds,
        "num_tokens": NUM_TOKENS,
    }
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bench.arrivals", system.plant.api_urls[0]),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await process.communicate(json.dumps(given).encode() + b"\n")
    return Arrivals.read(output)


def num_completed(system: TenantSystem) -> int:
    [(counted,)] = system.rows("SELECT count(*) FROM jobs WHERE status = 'completed'")
    return int(counted)


async def peak_per_second(system: TenantSystem, clients: dict[str, httpx.AsyncClient]) -> float:
    """Jobs completed a second while the queues never get empty and nothing is refused."""
    is_over = asyncio.Event()

    async def keep_busy(client: httpx.AsyncClient) -> None:
        while not is_over.is_set():
            await wait_for_ends(client, [await submit(client, NUM_TOKENS)])

    async with asyncio.TaskGroup() as group:
        for client in clients.values():
            for _ in range(8):
                group.create_task(keep_busy(client))
        await asyncio.sleep(PEAK_SECONDS / 4)
        before, began_at = num_completed(system), time.perf_counter()
        await asyncio.sleep(PEAK_SECONDS)
        rate = (num_completed(system) - before) / (time.perf_counter() - began_at)
        is_over.set()
    return rate


@asynccontextmanager
async def sampled(system: TenantSystem) -> AsyncIterator[list[dict[str, float]]]:
    """Memory by part, every few seconds, once the overload has lasted a while."""
    samples: list[dict[str, float]] = []

    async def sample() -> None:
        await asyncio.sleep(WARM_SECONDS)
        while True:
            samples.append(await asyncio.to_thread(system.memory_mib))
            await asyncio.sleep(SAMPLE_SECONDS)

    task = asyncio.create_task(sample())
    try:
        yield samples
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def overload(system: TenantSystem, *, per_second: float, seconds: float) -> tuple[Arrivals, dict[str, Any]]:
    headers = {"authorization": f"Bearer {system.admin_key(next(iter(TENANTS)))}"}
    async with sampled(system) as samples, httpx.AsyncClient(base_url=system.plant.api_urls[0], headers=headers) as own:
        loop = asyncio.create_task(open_loop(system, per_second=per_second, seconds=seconds))
        await asyncio.sleep(WARM_SECONDS)
        told = {name: await histogram(own, f"celeriac_{name}", **labels) for name, labels in TOLD.items()}
        before, began_at = num_completed(system), time.perf_counter()
        arrivals = await loop
        goodput = (num_completed(system) - before) / (time.perf_counter() - began_at)
        own_p99_ms = {
            name: round(1000 * quantile(told[name], await histogram(own, f"celeriac_{name}", **labels), 0.99), 1)
            for name, labels in TOLD.items()
        }
    return arrivals, {
        "goodput_per_second": round(goodput, 2),
        "server_p99_ms": own_p99_ms,
        "memory_mib": _growth(samples),
    }


def _growth(samples: list[dict[str, float]]) -> dict[str, list[float]]:
    """Of each part: at first, and at most in the last third."""
    last = samples[-max(1, len(samples) // 3) :]
    return {name: [samples[0][name], max(sample[name] for sample in last)] for name in samples[0]}


async def recovery(system: TenantSystem, clients: dict[str, httpx.AsyncClient], idle_seconds: float) -> dict[str, Any]:
    """How long after the last arrival the queues are empty, and then a job is as fast as before."""
    began_at = time.perf_counter()
    await wait_until_async(lambda: not system.rows(UNFINISHED), "the queues are empty", seconds=300)
    drained = time.perf_counter() - began_at
    client = next(iter(clients.values()))
    seconds = await idle_job_seconds(client, 3)
    while seconds > 1.5 * idle_seconds and time.perf_counter() - began_at < drained + 60:
        seconds = await idle_job_seconds(client, 3)
    return {
        "drained_after_s": round(drained, 2),
        "as_before_after_s": round(time.perf_counter() - began_at - drained, 2),
        "job_before_s": round(idle_seconds, 3),
        "job_after_s": round(seconds, 3),
    }


async def idle_job_seconds(client: httpx.AsyncClient, num_jobs: int) -> float:
    """The median time from submitting a job to having its result, one after the other."""

    async def run_one() -> None:
        await wait_for_ends(client, [await submit(client, NUM_TOKENS)])

    return percentile([await timed(run_one) for _ in range(num_jobs)], 0.5)


async def run(system: TenantSystem, given: argparse.Namespace) -> dict[str, Any]:
    async with AsyncExitStack() as stack:
        clients = {name: await stack.enter_async_context(tenant.client()) for name, tenant in system.tenants.items()}
        idle_seconds = await idle_job_seconds(next(iter(clients.values())), 10)
        peak = await peak_per_second(system, clients)
        arrivals, figures = await overload(
            system, per_second=OVERLOAD * peak, seconds=WARM_SECONDS + 60 * given.minutes
        )
        recovered = await recovery(system, clients, idle_seconds)
        shed = await not_completed(clients, arrivals)
    refused, accepted = arrivals.refused or [0.0], arrivals.accepted or [0.0]
    return {
        "peak_per_second": round(peak, 2),
        **figures,
        "goodput_share": round(figures["goodput_per_second"] / peak, 3),
        "refused_p50_ms": round(1000 * percentile(refused, 0.5), 1),
        "refused_p99_ms": round(1000 * percentile(refused, 0.99), 1),
        "refused_p99_ms_by_fifth": [round(1000 * percentile(part, 0.99), 1) for part in fifths(refused)],
        "accepted_p99_ms": round(1000 * percentile(accepted, 0.99), 1),
        "num_accepted": len(arrivals.accepted),
        "num_not_completed": shed,
        "statuses": dict(arrivals.statuses),
        "num_without_retry_after": arrivals.num_without_retry_after,
        "generator_p99_max_ms": {
            "requests": _p99_and_max(arrivals.late_seconds),
            "timer": _p99_and_max(arrivals.lags),
        },
        **recovered,
    }


def _p99_and_max(seconds: Sequence[float]) -> list[float]:
    return [round(1000 * percentile(seconds, share), 1) for share in (0.99, 1.0)]


def fifths(values: Sequence[float]) -> list[Sequence[float]]:
    """In their order: what grows with time does so from one to the next."""
    bounds = [len(values) * number // 5 for number in range(6)]
    return [values[first:last] for first, last in pairwise(bounds) if first < last]


async def not_completed(clients: dict[str, httpx.AsyncClient], arrivals: Arrivals) -> int:
    """How many of the accepted jobs did not end as completed."""
    num_bad = 0
    for name, job_ids in arrivals.job_ids.items():
        for start in range(0, len(job_ids), 32):
            jobs = await wait_for_ends(clients[name], job_ids[start : start + 32])
            num_bad += sum(job["status"] != "completed" for job in jobs)
    return num_bad


def is_flat(first: float, last: float) -> bool:
    return last <= first * (1 + GROWTH) + SLACK_MIB


def show(figures: dict[str, Any]) -> None:
    print(
        f"peak {figures['peak_per_second']} jobs/s; goodput at {OVERLOAD:.0f} times that "
        f"{figures['goodput_per_second']} jobs/s, {figures['goodput_share']:.1%}"
    )
    print(
        f"refusals p50 {figures['refused_p50_ms']} ms, p99 {figures['refused_p99_ms']} ms "
        f"(in fifths of the time: {figures['refused_p99_ms_by_fifth']}); accepts p99 "
        f"{figures['accepted_p99_ms']} ms; {figures['statuses']}"
    )
    print(
        f"the server's own p99 in ms: {figures['server_p99_ms']}; how late the generator was, p99 and longest in ms: "
        f"{figures['generator_p99_max_ms']}"
    )
    print(f"{figures['num_not_completed']} of {figures['num_accepted']} accepted jobs did not complete")
    for name, (first, last) in figures["memory_mib"].items():
        print(f"{name:12} {first:7.1f} MiB -> {last:7.1f} MiB {'' if is_flat(first, last) else '  NOT FLAT'}")
    print(
        f"drained {figures['drained_after_s']} s after the last arrival; a job took {figures['job_before_s']} s "
        f"before and {figures['job_after_s']} s after, {figures['as_before_after_s']} s later"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3.0, help="of overload")
    given = parser.parse_args()
    print(machine())
    folder = Path(tempfile.mkdtemp(prefix="celeriac-bench-"))
    try:
        with running_system(folder, TENANTS, settings={"max_queued_jobs": MAX_QUEUED}) as system:
            figures = asyncio.run(run(system, given))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    show(figures)
    print(json.dumps({"bench": "overload", "machine": machine(), "minutes": given.minutes, **figures}))


if __name__ == "__main__":
    main()
