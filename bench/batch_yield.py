"""Measures what a batch costs interactive requests: time to first token with and without a batch in its slots.

    python -m bench.batch_yield --model fake
    python -m bench.batch_yield --model celeriac-mini

Runs the whole system as it is shipped on this machine, and times one streamed request after another from the POST to
the first text. The ceiling is the same request on the idle system. Prints both, then one JSON line; the aim is a median
ratio below 2.
"""

import argparse
import io
import json
import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import openai

from settings import ROOT
from tests.chaos.plant import Plant

NUM_SLOTS = 16
MODELS = {
    "fake": f"""
[[models]]
id = "fake"
path = "none"
backend = "fake"
max_model_len = 1024
max_num_seqs = {NUM_SLOTS}
fake = {{ step_seconds = 0.02 }}
""",
    "celeriac-mini": f"""
[[models]]
id = "celeriac-mini"
path = "{ROOT}/models/celeriac-mini"
max_model_len = 1024
max_num_seqs = {NUM_SLOTS}
""",
}
CHAT: Any = "/v1/chat/completions"
WARM_UP = 5


def first_token_milliseconds(client: openai.OpenAI, model: str, number: int) -> float:
    messages: Any = [{"role": "user", "content": f"Tell me a story, number {number}."}]
    started = time.perf_counter()
    with client.chat.completions.create(model=model, messages=messages, max_completion_tokens=8, stream=True) as stream:
        for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content:
                return (time.perf_counter() - started) * 1000
    raise AssertionError("the stream had no text")


def measure(client: openai.OpenAI, model: str, num_requests: int) -> list[float]:
    taken = [first_token_milliseconds(client, model, number) for number in range(WARM_UP + num_requests)]
    return sorted(taken[WARM_UP:])


def start_batch(client: openai.OpenAI, model: str, num_lines: int) -> str:
    lines = []
    for number in range(num_lines):
        messages = [{"role": "user", "content": f"Tell me a long story, number {number}."}]
        body = {"model": model, "messages": messages, "max_tokens": 200, "ignore_eos": True}
        lines.append(json.dumps({"custom_id": str(number), "method": "POST", "url": CHAT, "body": body}))
    file = client.files.create(file=("in.jsonl", io.BytesIO("\n".join(lines).encode())), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h").id


def wait_until_it_fills_its_share(plant: Plant) -> int:
    """Returns the number of lines that are then running."""
    num_running = 0
    while num_running < NUM_SLOTS // 2:
        time.sleep(0.1)
        with plant.connect() as connection:
            [(counted,)] = connection.execute("SELECT count(*) FROM jobs WHERE status = 'in_progress'").fetchall()
        num_running = int(str(counted))
    return num_running


def p(values: list[float], share: float) -> float:
    return round(values[min(len(values) - 1, int(share * len(values)))], 1)


def run(plant: Plant, model: str, num_requests: int, num_lines: int) -> dict[str, Any]:
    with openai.OpenAI(base_url=f"{plant.api_urls[0]}/v1", api_key="any", max_retries=0) as client:
        idle = measure(client, model, num_requests)
        batch_id = start_batch(client, model, num_lines)
        num_running = wait_until_it_fills_its_share(plant)
        busy = measure(client, model, num_requests)
        status = client.batches.retrieve(batch_id).status
        client.batches.cancel(batch_id)
    assert status == "in_progress", f"the batch was {status} before the measurement ended: give it more --lines"
    return {
        "model": model,
        "requests": num_requests,
        "slots": NUM_SLOTS,
        "lines_running": num_running,
        "idle_p50_ms": p(idle, 0.5),
        "idle_p99_ms": p(idle, 0.99),
        "busy_p50_ms": p(busy, 0.5),
        "busy_p99_ms": p(busy, 0.99),
        "ratio_p50": round(statistics.median(busy) / statistics.median(idle), 2),
        "machine": platform.processor() or platform.machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=list(MODELS), default="fake")
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--lines", type=int, default=5_000)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="celeriac-bench-"))
    try:
        with Plant(folder, models=MODELS[given.model], worker_models={"gpu-1": given.model}) as plant:
            plant.start_servers()
            plant.start_parts()
            plant.wait_until_ready()
            figures = run(plant, given.model, given.requests, given.lines)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"idle: p50 {figures['idle_p50_ms']} ms, p99 {figures['idle_p99_ms']} ms")
    print(f"during a batch: p50 {figures['busy_p50_ms']} ms, p99 {figures['busy_p99_ms']} ms")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
