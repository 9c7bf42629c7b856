"""Submits jobs when they are due, whatever became of the earlier ones: `python -m bench.arrivals URL`.

A process of its own, so that what else a bench does makes neither requests late nor answers seem so; with plain
sockets, as bench/flood.py. On stdin one line of JSON: the keys by name, how many a second, for how many seconds, and
how many tokens each. Prints one line of JSON: a list for each name of [status, seconds until the answer, job id or
nothing], where an error of the connection has its name for a status; how many refusals had no Retry-After, and how late
this process was: its requests, and a timer of it.
"""

import asyncio
import json
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any
from urllib.parse import urlsplit

import uvloop

from bench.flood import Line, Step
from bench.tenants import job_body

BEAT_SECONDS = 0.005


@dataclass(slots=True)
class Arrivals:
    host: str
    port: int
    num_tokens: int
    lines: deque[Line] = field(default_factory=deque)  # that are open and idle
    answers: dict[str, list[tuple[int | str, float, str | None]]] = field(default_factory=dict)
    num_without_retry_after: int = 0
    late_seconds: list[float] = field(default_factory=list)

    async def send(self, name: str, key: str, due_at: float) -> None:
        answers = self.answers.setdefault(name, [])
        try:
            line = self.lines.pop() if self.lines else Line(*await asyncio.open_connection(self.host, self.port))
            try:
                answers.append(await self._submit(line, key, due_at))
            except BaseException:
                line.close()
                raise
        except (OSError, EOFError, ValueError) as exc:
            answers.append((type(exc).__name__, time.perf_counter() - due_at, None))
        else:
            self.lines.append(line)

    async def _submit(self, line: Line, key: str, due_at: float) -> tuple[int, float, str | None]:
        request = Step("POST", "/v1/jobs", body=json.dumps(job_body(self.num_tokens)))
        began_at = time.perf_counter()
        self.late_seconds.append(began_at - due_at)
        await line.send(request.rendered({"key": key}))
        status, head, body = await line.answer("POST")
        seconds = time.perf_counter() - began_at
        self.num_without_retry_after += status != 202 and b"\r\nretry-after: " not in head
        return status, seconds, json.loads(body)["id"] if status == 202 else None


async def beat(lags: list[float]) -> None:
    while True:
        due_at = time.perf_counter() + BEAT_SECONDS
        await asyncio.sleep(BEAT_SECONDS)
        lags.append(time.perf_counter() - due_at)


async def run(url: str, given: dict[str, Any]) -> dict[str, Any]:
    parts = urlsplit(url)
    arrivals = Arrivals(parts.hostname or "", parts.port or 80, given["num_tokens"])
    lags: list[float] = []
    beating = asyncio.create_task(beat(lags))
    began_at = time.perf_counter()
    senders = cycle(given["keys"].items())
    async with asyncio.TaskGroup() as group:
        for number in range(int(given["per_second"] * given["seconds"])):
            due_at = began_at + number / given["per_second"]
            if (early := due_at - time.perf_counter()) > 0:
                await asyncio.sleep(early)
            name, key = next(senders)
            group.create_task(arrivals.send(name, key, due_at))
    beating.cancel()
    return {
        "answers": arrivals.answers,
        "num_without_retry_after": arrivals.num_without_retry_after,
        "late_seconds": sorted(arrivals.late_seconds),
        "lags": sorted(lags),
    }


if __name__ == "__main__":
    print(json.dumps(uvloop.run(run(sys.argv[1], json.loads(sys.stdin.readline())))))
