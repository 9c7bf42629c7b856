"""A text that is followed while its engine is killed three times: what any engine must hold with a real model."""

import os
import signal
from typing import Any

from celeriac.client import Client
from tests.integration.test_main_job import System

NUM_TOKENS, NUM_KILLS = 240, 3
NUM_CHUNKS = 3  # that the stream has shown between two kills
PROMPT = "The capital of France is"
WORDS = {"type": "array", "items": {"type": "string", "maxLength": 12}, "minItems": 14, "maxItems": 14}
FREE: dict[str, Any] = {"ignore_eos": True}
DRAWN: dict[str, Any] = {"ignore_eos": True, "temperature": 0.9, "seed": 7}
UNDER_A_SCHEMA: dict[str, Any] = {"structured_output": {"json_schema": WORDS}}


def submit(client: Client, model: str, params: dict[str, Any], num_tokens: int = NUM_TOKENS) -> str:
    return client.submit(PROMPT, model=model, **{"temperature": 0, "max_tokens": num_tokens} | params).id


def text_of(client: Client, job_id: str) -> str:
    """What the job's stream says, which is what its row says."""
    text = "".join(event.data["text"] for event in client.stream(job_id) if event.name == "output.delta")
    job = client.get(job_id)
    assert job.status == "completed", job
    assert text == job.text
    return text


def text_through_kills(client: Client, system: System, model: str, params: dict[str, Any]) -> str:
    """The text of a job whose engine is killed in mid-stream, which must be that of a job left in peace."""
    undisturbed = text_of(client, submit(client, model, params))
    job_id = submit(client, model, params)
    text, num_killed, num_seen, is_running = "", 0, 0, True
    for event in client.stream(job_id):
        if event.name == "job.started":
            num_seen, is_running = 0, True
        if event.name == "output.delta":
            text += event.data["text"]
            num_seen += 1
        # What still arrives after a kill is from before: another one would only hit an engine that loads.
        if is_running and num_seen >= NUM_CHUNKS and num_killed < NUM_KILLS:
            pid = system.plant.workers[0].engine_pid()
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            num_killed, is_running = num_killed + 1, False
    assert num_killed == NUM_KILLS, "the job ended before its last kill"
    assert text == undisturbed == text_of(client, job_id)
    attempt = client.get(job_id).raw["attempt"]
    assert attempt > NUM_KILLS, f"the job had ended by its last kill, in attempt {attempt}"  # a lost lease adds more
    return text
