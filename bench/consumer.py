"""Measures the consumer alone, without engine and SQL, on an embedded Redis: `python -m bench.consumer`.

Prints the ceiling (claims and acks without Celery), the jobs/s of one worker with Flower's events on, the time from
publish to admission on an idle worker, and the messages lost to SIGKILLs at full pull speed; then one JSON line.
"""

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from base64 import b64decode
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import redis

from domain.jobs import new_id
from gpu_worker.transport import IDLE_SECONDS, TAKE, idle_key
from local.servers import EmbeddedRedis
from tasks.dispatch import count_waiting, send
from tasks.messages import PRIORITY_STEPS, bell_key, priority_keys

ROOT = Path(__file__).resolve().parent.parent
QUEUE = "celeriac.bench"
NUM_SLOTS = 64
LOOKAHEAD = 16
TAKE_SIZE = NUM_SLOTS + LOOKAHEAD


class Bench:
    """A broker, and one worker at a time."""

    def __init__(self, folder: Path, redis_url: str) -> None:
        self._folder = folder
        self._redis_url = redis_url
        self._ledger = folder / "ledger"
        self._models_file = folder / "models.toml"
        self._models_file.write_text(
            '[[models]]\nid = "bench"\npath = "none"\nbackend = "fake"\nmax_model_len = 64\n'
            f"max_num_seqs = {NUM_SLOTS}\n"
        )
        self.client = redis.Redis.from_url(redis_url)

    def start_worker(self) -> subprocess.Popen[bytes]:
        environment = os.environ | {
            "CELERIAC_REDIS_URL": self._redis_url,
            "CELERIAC_MODELS_FILE": str(self._models_file),
            "CELERIAC_LOOKAHEAD": str(LOOKAHEAD),
            "CELERIAC_LOG_LEVEL": "WARNING",
            "CONSUMER_BENCH_LEDGER": str(self._ledger),
        }
        command = [sys.executable, "-m", "celery", "-A", "bench.consumer_app", "worker"]
        with (self._folder / "worker.log").open("ab") as log:
            return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)

    def reset(self) -> None:
        self.client.flushall()
        self._ledger.write_text("")

    def publish(self, num_jobs: int) -> None:
        for first in range(0, num_jobs, 1000):
            job_ids = [new_id() for _ in range(min(1000, num_jobs - first))]
            send(self.client, QUEUE, job_ids, window=10**6)

    def claims(self) -> list[float]:
        """The monotonic times at which jobs were claimed, in order."""
        lines = [line.split() for line in self._ledger.read_text().splitlines()]
        return [float(words[1]) for words in lines if len(words) == 2]

    def num_claims(self) -> int:
        return self._ledger.read_bytes().count(b"\n")

    def num_in_broker(self) -> int:
        """How many messages wait or are unacknowledged."""
        num_unacked: Any = self.client.hlen("unacked")
        return count_waiting(self.client, QUEUE) + int(num_unacked)


def wait_until(is_true: Callable[[], bool], *, seconds: float = 120.0, poll_seconds: float = 0.005) -> None:
    deadline = time.monotonic() + seconds
    while not is_true():
        if time.monotonic() > deadline:
            raise TimeoutError("the worker took too long")
        time.sleep(poll_seconds)


def end(worker: subprocess.Popen[bytes]) -> None:
    worker.send_signal(signal.SIGQUIT)
    worker.wait(timeout=30)


def bench_ceiling(bench: Bench, num_jobs: int) -> float:
    """Jobs/s with nothing but the takes and acks that the worker's channel makes."""
    bench.reset()
    bench.publish(num_jobs)
    script = bench.client.register_script(TAKE)
    keys = ["unacked", "unacked_index", bell_key(QUEUE), idle_key(QUEUE), *priority_keys(QUEUE)]
    queues = [QUEUE] * len(PRIORITY_STEPS)
    started_at = time.monotonic()
    num_done = 0
    while num_done < num_jobs:
        found: Any = script(keys, [TAKE_SIZE, time.time(), 0, "bench", 1, *queues, int(IDLE_SECONDS * 1000)])
        tags = [json.loads(text)["properties"]["delivery_tag"] for text in found[1::2]]
        pipeline = bench.client.pipeline(transaction=False)
        pipeline.hdel("unacked", *tags)
        pipeline.zrem("unacked_index", *tags)
        pipeline.execute()
        num_done += len(tags)
    return num_jobs / (time.monotonic() - started_at)


class Throughput(NamedTuple):
    jobs_per_second: float  # from the first claim to the last ack
    events_per_job: float  # task events that the subscriber received
    cpu_ms_per_job: float  # of the worker's main process; independent of other load on the machine


def bench_throughput(bench: Bench, num_jobs: int) -> Throughput:
    bench.reset()
    bench.publish(num_jobs)
    pubsub: Any = bench.client.pubsub(ignore_subscribe_messages=True)  # type: ignore[no-untyped-call]
    pubsub.psubscribe("/0.celeryev/task*")
    pubsub.get_message(timeout=1)  # the confirmation
    worker = bench.start_worker()
    wait_until(lambda: bench.num_claims() > 0)
    num_before, cpu_before = bench.num_claims(), cpu_seconds(worker)
    wait_until(lambda: bench.num_claims() >= num_jobs)
    wait_until(lambda: bench.client.hlen("unacked") == 0)
    ended_at = time.monotonic()
    cpu = cpu_seconds(worker) - cpu_before
    end(worker)
    claims = bench.claims()
    assert len(claims) == num_jobs
    num_events = 0
    while (message := pubsub.get_message(timeout=0.2)) is not None:
        num_events += count_events(message["data"])
    pubsub.close()
    rate = num_jobs / (ended_at - claims[0])
    return Throughput(rate, num_events / num_jobs, cpu * 1000 / (num_jobs - num_before))


def cpu_seconds(process: subprocess.Popen[bytes]) -> float:
    times = psutil.Process(process.pid).cpu_times()
    return float(times.user + times.system)


def count_events(data: bytes) -> int:
    body = json.loads(b64decode(json.loads(data)["body"]))
    return len(body) if isinstance(body, list) else 1


def bench_latency(bench: Bench, num_jobs: int) -> list[float]:
    """Milliseconds from before the publish to the claim, sorted; one job at a time, with pauses."""
    bench.reset()
    worker = bench.start_worker()
    bench.publish(1)
    wait_until(lambda: bench.num_claims() == 1)
    published_at = []
    for number in range(num_jobs):
        published_at.append(time.monotonic())
        bench.publish(1)
        wait_until(lambda number=number: bench.num_claims() >= number + 2)  # type: ignore[misc]
        time.sleep(random.uniform(0.005, 0.03))
    end(worker)
    claims = bench.claims()[1:]
    return sorted((claimed_at - at) * 1000 for at, claimed_at in zip(published_at, claims, strict=True))


def bench_kills(bench: Bench, num_kills: int) -> tuple[int, int]:
    """SIGKILL a worker that pulls at full speed, again and again. Returns the numbers of messages published and
    of those lost, which were neither used nor left in the broker. (One used twice may hide one that is lost.)"""
    bench.reset()
    num_published = 0
    for _ in range(num_kills):
        if count_waiting(bench.client, QUEUE) < 5000:
            bench.publish(10_000)
            num_published += 10_000
        num_before = bench.num_claims()
        worker = bench.start_worker()
        wait_until(lambda before=num_before: bench.num_claims() > before)  # type: ignore[misc]
        time.sleep(random.uniform(0.0, 0.15))
        worker.kill()
        worker.wait()
    return num_published, max(0, num_published - len(bench.claims()) - bench.num_in_broker())


def run(bench: Bench, options: argparse.Namespace) -> dict[str, object]:
    """Run all measurements, print each as it is made, and return the figures."""
    ceiling = max(bench_ceiling(bench, options.jobs) for _ in range(options.rounds))
    print(f"ceiling: claims of {TAKE_SIZE} and their acks, no Celery   {ceiling:8.0f} jobs/s", flush=True)

    rounds = [bench_throughput(bench, options.jobs) for _ in range(options.rounds)]
    rates = sorted(round(result.jobs_per_second) for result in rounds)
    cpu_ms = min(result.cpu_ms_per_job for result in rounds)
    print(f"one worker, {NUM_SLOTS} slots, events on: {rates} jobs/s, {cpu_ms:.3f} ms of its CPU per job", flush=True)

    latencies = bench_latency(bench, options.samples)
    p50, p99 = latencies[len(latencies) // 2], latencies[int(len(latencies) * 0.99)]
    print(f"publish to admission, idle worker: p50 {p50:.2f} ms, p99 {p99:.2f} ms", flush=True)

    num_published, num_lost = bench_kills(bench, options.kills)
    print(f"{options.kills} SIGKILLs at full pull speed: {num_lost} of {num_published} messages lost", flush=True)
    return {
        "ceiling_jobs_per_second": round(ceiling),
        "jobs_per_second": rates,
        "cpu_ms_per_job": round(cpu_ms, 3),
        "events_per_job": round(min(result.events_per_job for result in rounds), 3),
        "admission_p50_ms": round(p50, 2),
        "admission_p99_ms": round(p99, 2),
        "kills": options.kills,
        "messages_published": num_published,
        "messages_lost": num_lost,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--kills", type=int, default=40)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, EmbeddedRedis(Path(folder) / "redis") as server:
        figures = run(Bench(Path(folder), server.url), options)
    machine = f"{os.cpu_count()} cores, Python {platform.python_version()}"
    print(json.dumps({"bench": "consumer", "machine": machine, **figures}))


if __name__ == "__main__":
    main()
