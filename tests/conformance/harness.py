"""A running system as the conformance tests see it, and raw frames where an SDK would hide them."""

import json
from dataclasses import dataclass
from typing import Any

import httpx
import openai

from domain.jobs import parse_id
from gpu_worker.engine.fake_tokens import fake_text
from tests.integration.api_harness import ApiServer
from tests.integration.runner_harness import RecordingRunner, Rig

MESSAGES: Any = [{"role": "user", "content": "Hi"}]
PROMPT_TOKEN_IDS = list(b"user: Hi\nassistant: ")  # MESSAGES, by the template and the tokenizer of the fake back end


@dataclass
class Served:
    server: ApiServer
    rig: Rig
    worker: RecordingRunner
    client: openai.OpenAI

    def text_of(self, completion_id: str, *, index: int = 0, num_tokens: int) -> str:
        """What the fake engine says to MESSAGES in this job."""
        return fake_text(PROMPT_TOKEN_IDS, self.rig.job(parse_id(completion_id)).seed, index, num_tokens)


def frames_of(response: httpx.Response) -> list[Any]:
    """The data of each event of a body, [DONE] as it is. Asserts that there is nothing but data and comments."""
    blocks = response.text.split("\n\n")
    assert blocks.pop() == "", "the last event ends in a blank line"
    lines = [[line for line in block.split("\n") if not line.startswith(":")] for block in blocks]
    assert all(len(block) == 1 and block[0].startswith("data: ") for block in lines), lines
    datas = [block[0].removeprefix("data: ") for block in lines]
    return [data if data == "[DONE]" else json.loads(data) for data in datas]


def chat_body(**fields: Any) -> dict[str, Any]:
    return {"model": "test-model", "messages": MESSAGES, "max_completion_tokens": 8} | fields
