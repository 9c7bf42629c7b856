"""One batch on the shipped processes while they are killed: each of its lines must be answered once.

python -m tests.chaos.batch_run --lines 10000 --worker-kills 6 --maintenance-kills 4 --endpoint /v1/embeddings
"""

import argparse
import io
import json
import random
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import openai

from tests.chaos.plant import Part, Plant

MODEL = "fake"
MODELS = f"""
[[models]]
id = "{MODEL}"
path = "none"
backend = "fake"
max_model_len = 512
max_num_seqs = 16

[models.fake]
step_seconds = 0.002
"""
SETTINGS = {
    "lease_seconds": 2,
    "lease_grace_seconds": 0.5,
    "janitor_interval_seconds": 0.3,
    "max_failures": 50,
    "batch_jobs_in_flight": 64,
}
CHAT, EMBEDDINGS = "/v1/chat/completions", "/v1/embeddings"


def line(number: int, endpoint: str) -> bytes:
    if endpoint == EMBEDDINGS:
        body: dict[str, Any] = {"model": MODEL, "input": [f"Number {number}", "and another"]}
    else:
        messages = [{"role": "user", "content": f"Number {number}"}]
        body = {"model": MODEL, "messages": messages, "max_tokens": 8, "seed": 1}
    request = {"custom_id": f"line-{number}", "method": "POST", "url": endpoint, "body": body}
    return json.dumps(request).encode() + b"\n"


class BatchRun:
    """A batch and what befalls it. `run` returns figures, or raises AssertionError for a line lost or repeated."""

    def __init__(
        self, plant: Plant, *, num_lines: int, strikes: list[Part], deadline_seconds: float, endpoint: str
    ) -> None:
        """`strikes`: which parts are killed, spread evenly over the batch."""
        self._plant = plant
        self._num_lines = num_lines
        self._strikes = strikes
        self._endpoint: Any = endpoint
        self._deadline = time.monotonic() + deadline_seconds
        self._client = openai.OpenAI(base_url=f"{plant.api_urls[0]}/v1", api_key="any")

    def run(self) -> dict[str, object]:
        started = time.monotonic()
        content = b"".join(line(number, self._endpoint) for number in range(self._num_lines))
        file = self._client.files.create(file=("in.jsonl", io.BytesIO(content)), purpose="batch")
        batch = self._client.batches.create(input_file_id=file.id, endpoint=self._endpoint, completion_window="24h")
        for number, part in enumerate(self._strikes, start=1):
            at = number * self._num_lines // (len(self._strikes) + 1)
            self._wait(batch.id, lambda batch, at=at: batch.request_counts.completed >= at)
            part.kill()
        batch = self._wait(batch.id, lambda batch: batch.status in ("completed", "failed", "expired"))
        assert batch.status == "completed", batch
        assert batch.error_file_id is None, self._client.files.content(batch.error_file_id).text[:1000]
        written = [json.loads(one) for one in self._client.files.content(batch.output_file_id).text.splitlines()]
        counts = Counter(one["custom_id"] for one in written)
        assert counts == Counter(f"line-{number}" for number in range(self._num_lines))
        assert len({one["response"]["request_id"] for one in written}) == self._num_lines
        with self._plant.connect() as connection:
            [(num_jobs, num_again)] = connection.execute(
                "SELECT count(*), count(*) FILTER (WHERE attempt > 1) FROM jobs"
            ).fetchall()
        assert num_jobs == self._num_lines, "a line was fed twice"
        seconds = round(time.monotonic() - started, 1)
        return {"lines": self._num_lines, "kills": len(self._strikes), "continued": num_again, "seconds": seconds}

    def _wait(self, batch_id: str, is_reached: Any) -> Any:
        while time.monotonic() < self._deadline:
            self._plant.watch()
            batch = self._client.batches.retrieve(batch_id)
            if is_reached(batch) or batch.status in ("completed", "failed", "expired"):
                return batch
            time.sleep(0.1)
        raise AssertionError(f"the batch did not get there in time: {batch}")


def run(
    *, num_lines: int, num_worker_kills: int, num_maintenance_kills: int, deadline_seconds: float, endpoint: str = CHAT
) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp(prefix="celeriac-batch-"))
    try:
        plant = Plant(folder, models=MODELS, worker_models={"gpu-1": MODEL, "gpu-2": MODEL}, settings=SETTINGS)
        with plant:
            plant.start_servers()
            plant.start_parts()
            plant.wait_until_ready()
            strikes = [plant.workers[number % 2] for number in range(num_worker_kills)]
            strikes += [plant.maintenance[0]] * num_maintenance_kills
            random.Random(7).shuffle(strikes)
            batch = BatchRun(
                plant, num_lines=num_lines, strikes=strikes, deadline_seconds=deadline_seconds, endpoint=endpoint
            )
            return batch.run()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=int, default=10_000)
    parser.add_argument("--worker-kills", type=int, default=6)
    parser.add_argument("--maintenance-kills", type=int, default=4)
    parser.add_argument("--deadline-seconds", type=float, default=3600)
    parser.add_argument("--endpoint", choices=(CHAT, EMBEDDINGS), default=CHAT)
    given = parser.parse_args()
    figures = run(
        num_lines=given.lines,
        num_worker_kills=given.worker_kills,
        num_maintenance_kills=given.maintenance_kills,
        deadline_seconds=given.deadline_seconds,
        endpoint=given.endpoint,
    )
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
