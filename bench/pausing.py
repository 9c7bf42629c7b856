"""Measures what it costs that jobs are paused for other tenants: `python -m bench.pausing`.

The whole system with celeriac-mini on the CPU. One tenant's long jobs (greedy, seeded, with a grammar, with two texts)
are read as streams, first alone, which is the ceiling, and then while another tenant always has a short job waiting.
Each text must be the same, and each stream without a gap or a repetition. Prints how many tokens were drawn or computed
a second time, then one JSON line. The aims: none drawn again, at most 1 % computed again, all texts and streams right.
"""

import argparse
import asyncio
import json
import re
import shutil
import tempfile
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import httpx

from bench.tenants import UNSERVED_MODEL as MODEL
from bench.tenants import TenantSystem, machine, running_system, submit, wait_for_ends
from settings import ROOT

NUM_TOKENS = 800  # of each text
COUNT_SECONDS = 3.0  # until the worker has added the engine's counts
MODELS = """
[[models]]
id = "{model}"
path = "{root}/models/celeriac-mini"
device = "cpu"
max_model_len = 1024
max_num_seqs = 4
kv_cache_tokens = {cache_tokens}
"""
GRAMMAR = {"regex": "([a-z ]{5}[.] )+"}
PARAMS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0, "ignore_eos": True},
    "seeded": {"temperature": 1.0, "seed": 7, "ignore_eos": True},
    "grammar": {"temperature": 1.0, "seed": 8, "structured_output": GRAMMAR},
    "two texts": {"temperature": 1.0, "seed": 9, "n": 2, "ignore_eos": True},
}
COUNTERS = ("generated_tokens_total", "jobs_recomputed_tokens_total", "jobs_paused_total")


@dataclass(slots=True)
class Read:
    """What one reader of a stream got."""

    texts: dict[int, str] = field(default_factory=dict)  # by choice
    ids: list[int] = field(default_factory=list)
    num_pauses: int = 0
    job: dict[str, Any] = field(default_factory=dict)  # the last event

    @property
    def is_whole(self) -> bool:
        """Its events have consecutive numbers, and its pieces are the text."""
        choices = self.job["output"]["choices"]
        is_in_order = self.ids == list(range(self.ids[0], self.ids[0] + len(self.ids)))
        return is_in_order and [self.texts.get(choice["index"], "") for choice in choices] == texts_of(self.job)


def texts_of(job: dict[str, Any]) -> list[str]:
    return [choice["text"] for choice in job["output"]["choices"]]


async def read(client: httpx.AsyncClient, job_id: str) -> Read:
    """The job's stream, from its beginning to its end."""
    got = Read()
    async with client.stream("GET", f"/v1/jobs/{job_id}/events") as answer:
        answer.raise_for_status()
        fields: dict[str, str] = {}
        async for line in answer.aiter_lines():
            if line:
                name, _, value = line.partition(": ")
                fields[name] = value
            elif fields:
                take(got, fields)
                fields = {}
    return got


def take(got: Read, fields: dict[str, str]) -> None:
    """One event."""
    if "id" in fields:
        got.ids.append(int(fields["id"]))
    match fields.get("event"):
        case "output.delta":
            delta = json.loads(fields["data"])
            got.texts[delta["index"]] = got.texts.get(delta["index"], "") + delta["text"]
        case "job.paused":
            got.num_pauses += 1
        case "job.completed":
            got.job = json.loads(fields["data"])


async def run_long_jobs(client: httpx.AsyncClient, num_jobs: int) -> list[Read]:
    """As many as there are, at once, each read as a stream."""
    bodies = [
        {"model": MODEL, "prompt": f"Once {number}", "params": {"max_tokens": NUM_TOKENS} | params}
        for number, params in enumerate(islice(cycle(PARAMS.values()), num_jobs))
    ]
    answers = [await client.post("/v1/jobs", json=body) for body in bodies]
    for answer in answers:
        if answer.status_code != 202:
            raise RuntimeError(f"the job was not accepted: {answer.text}")
    return list(await asyncio.gather(*(read(client, answer.json()["id"]) for answer in answers)))


async def disturb(client: httpx.AsyncClient) -> None:
    """Short jobs, two of which always wait or run."""

    async def repeat() -> None:
        while True:
            await wait_for_ends(client, [await submit(client, 3, model=MODEL, ignore_eos=True)])

    await asyncio.gather(repeat(), repeat())


def counted(system: TenantSystem) -> dict[str, float]:
    """The worker's counters."""
    urls = re.findall(r"metrics on (http://[\w.:]+)", system.plant.workers[0].log())
    text = httpx.get(f"{urls[-1]}/metrics", timeout=10).text
    found = {name: re.search(rf"^celeriac_{name}{{[^}}]*}} (\S+)$", text, re.MULTILINE) for name in COUNTERS}
    return {name: float(match[1]) if match else 0.0 for name, match in found.items()}


async def measure(system: TenantSystem, num_jobs: int) -> dict[str, Any]:
    async with AsyncExitStack() as stack:
        clients = {name: await stack.enter_async_context(one.client()) for name, one in system.tenants.items()}
        began_at = time.perf_counter()
        alone = await run_long_jobs(clients["alone"], num_jobs)
        alone_seconds = time.perf_counter() - began_at
        await asyncio.sleep(COUNT_SECONDS)
        before, num_before = counted(system), system.num_output_tokens()
        began_at = time.perf_counter()
        disturbing = asyncio.ensure_future(disturb(clients["quiet"]))
        paused = await run_long_jobs(clients["noisy"], num_jobs)
        paused_seconds = time.perf_counter() - began_at
        disturbing.cancel()
        await asyncio.gather(disturbing, return_exceptions=True)
        await asyncio.sleep(COUNT_SECONDS)
        after, num_after = counted(system), system.num_output_tokens()
    made = {name: round(after[name] - before[name]) for name in COUNTERS}
    num_tokens = sum(read.job["usage"]["completion_tokens"] for read in paused)
    pairs = zip(alone, paused, strict=True)
    return {
        "num_jobs": num_jobs,
        "num_pauses": made["jobs_paused_total"],
        "num_pauses_seen": sum(read.num_pauses for read in paused),
        "num_tokens": num_tokens,
        "num_drawn_again": made["generated_tokens_total"] - (num_after - num_before),
        "num_computed_again": made["jobs_recomputed_tokens_total"],
        "share_computed_again": round(made["jobs_recomputed_tokens_total"] / num_tokens, 4),
        "num_texts_changed": sum(texts_of(one.job) != texts_of(two.job) for one, two in pairs),
        "num_streams_wrong": sum(not read.is_whole for read in [*alone, *paused]),
        "alone_s": round(alone_seconds, 1),
        "paused_s": round(paused_seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=12, help="long jobs, of all kinds in turn")
    parser.add_argument("--quantum", type=float, default=2.0, help="CELERIAC_PAUSE_QUANTUM_SECONDS")
    parser.add_argument("--cache-tokens", type=int, default=4_096, help="by default, what fits into the slots")
    given = parser.parse_args()
    print(machine())
    folder = Path(tempfile.mkdtemp(prefix="celeriac-bench-"))
    models = MODELS.format(model=MODEL, root=ROOT, cache_tokens=given.cache_tokens)
    settings = {"pause_quantum_seconds": given.quantum, "log_level": "INFO"}
    tenants = {"alone": 1.0, "noisy": 1.0, "quiet": 1.0}  # the first one's cache is not the second's
    try:
        with running_system(folder, tenants, settings=settings, models=models, served=(MODEL,)) as system:
            figures = asyncio.run(measure(system, given.jobs))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for name, value in figures.items():
        print(f"  {name:24} {value}")
    print(json.dumps({"bench": "pausing", "machine": machine(), **figures}))


if __name__ == "__main__":
    main()
