"""SmolLM2-135M-Instruct, from its GGUF file, through the whole system: it says what transformers' `generate` says."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from transformers import AutoModelForCausalLM

from celeriac.client import Client
from celeriac.store.store import ModelStore
from tests.integration.test_main_job import System, kill_worker
from tests.real_models.conftest import CHAT, Reference

pytestmark = pytest.mark.slow

QUESTIONS = ["What is the capital of France?", "Name three colours.", "Why is the sky blue?"]
STORY = "Tell me a story about a fox."
NUM_TOKENS = 24
NUM_LONG_TOKENS = 64
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Paris", "Rome"]}, "is_capital": {"type": "boolean"}},
    "required": ["city", "is_capital"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def reference(store: ModelStore) -> Iterator[Reference]:
    with Reference(store.path(CHAT), AutoModelForCausalLM) as reference:
        yield reference


def messages(question: str) -> Any:
    return [{"role": "user", "content": question}]


def prompt_ids(reference: Reference, question: str) -> list[int]:
    told = reference.tokenizer.apply_chat_template(
        messages(question), add_generation_prompt=True, tokenize=True, return_dict=True
    )
    return list(told["input_ids"])


def test_chats_in_company_say_what_generate_says(sdk: openai.OpenAI, reference: Reference) -> None:
    def ask(question: str) -> tuple[str | None, str, int]:
        answer = sdk.chat.completions.create(
            model=CHAT, messages=messages(question), temperature=0, max_tokens=NUM_TOKENS
        )
        assert answer.usage is not None
        choice = answer.choices[0]
        return choice.message.content, choice.finish_reason, answer.usage.prompt_tokens

    with ThreadPoolExecutor(len(QUESTIONS)) as threads:
        answers = list(threads.map(ask, QUESTIONS))
    for question, answer in zip(QUESTIONS, answers, strict=True):
        ids = prompt_ids(reference, question)
        expected = reference.greedy(ids, NUM_TOKENS)
        is_ended = expected[-1] == reference.tokenizer.eos_token_id
        assert answer == (reference.text(expected), "stop" if is_ended else "length", len(ids))


def test_a_stop_string_ends_a_streamed_text_before_it(sdk: openai.OpenAI, reference: Reference) -> None:
    whole = reference.text(reference.greedy(prompt_ids(reference, QUESTIONS[2]), NUM_TOKENS))
    stop = whole[len(whole) // 2 :][:5]
    stream = sdk.chat.completions.create(
        model=CHAT, messages=messages(QUESTIONS[2]), temperature=0, max_tokens=NUM_TOKENS, stop=stop, stream=True
    )
    chunks = [chunk.choices[0] for chunk in stream if chunk.choices]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == whole[: whole.index(stop)]
    assert chunks[-1].finish_reason == "stop"


def test_a_schema_is_obeyed(sdk: openai.OpenAI) -> None:
    answer = sdk.chat.completions.create(
        model=CHAT,
        messages=messages("Which city has the Eiffel Tower, and is it a capital? Answer in JSON."),
        temperature=0,
        max_tokens=NUM_LONG_TOKENS,
        response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA, "strict": True}},
    )
    told = json.loads(answer.choices[0].message.content or "")
    assert told["city"] in ("Oslo", "Paris", "Rome")
    assert told["is_capital"] in (True, False)


def test_tools_that_the_template_cannot_show_are_refused_with_the_reason(sdk: openai.OpenAI) -> None:
    tool: Any = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
    with pytest.raises(openai.BadRequestError, match="tools"):
        sdk.chat.completions.create(model=CHAT, messages=messages("What time is it?"), tools=[tool])


def test_a_worker_killed_in_mid_stream_changes_no_token(system: System, client: Client, reference: Reference) -> None:
    """The stream of the job whose worker is killed, and a reader who comes later and begins at its start."""
    job = client.submit(messages(STORY), model=CHAT, max_tokens=NUM_LONG_TOKENS, temperature=0, ignore_eos=True)
    text, is_killed = "", False
    for event in client.stream(job.id):
        text += event.data["text"] if event.name == "output.delta" else ""
        if text and not is_killed:
            kill_worker(system)
            is_killed = True
    ended = client.get(job.id)
    assert ended.status == "completed", ended
    assert ended.raw["attempt"] > 1, "the worker was killed too late"
    replayed = "".join(event.data["text"] for event in client.stream(job.id) if event.name == "output.delta")
    eos = reference.model.generation_config.eos_token_id
    reference.model.generation_config.eos_token_id = None  # as `ignore_eos` has it
    expected = reference.greedy(prompt_ids(reference, STORY), NUM_LONG_TOKENS)
    reference.model.generation_config.eos_token_id = eos
    assert text == replayed == ended.text == reference.text(expected)
