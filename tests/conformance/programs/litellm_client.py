"""What people do with LiteLLM as a client. Asserts for itself."""

import json
import os
from importlib.metadata import version
from typing import Any

import litellm

from tests.conformance.programs import report

MESSAGES = [{"role": "user", "content": "Hi"}]
ADD: Any = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
there: Any = {"api_base": os.environ["OPENAI_BASE_URL"], "api_key": os.environ["OPENAI_API_KEY"], "num_retries": 0}


def chat() -> None:
    answer: Any = litellm.completion(model="openai/test-model", messages=MESSAGES, max_tokens=8, **there)
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 8


def streaming() -> None:
    stream: Any = litellm.completion(model="openai/test-model", messages=MESSAGES, max_tokens=8, stream=True, **there)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream)


def tool_call() -> None:
    answer: Any = litellm.completion(model="openai/by-hand", messages=MESSAGES, tools=[ADD], max_tokens=30, **there)
    [call] = answer.choices[0].message.tool_calls
    assert call.function.name == "add"
    assert json.loads(call.function.arguments) == {"a": 1}


def text_completion() -> None:
    answer: Any = litellm.text_completion(
        model="text-completion-openai/test-model", prompt="One", max_tokens=4, **there
    )
    assert answer.choices[0].text


def embeddings() -> None:
    """Without `dimensions`, which LiteLLM refuses by itself for models that are not OpenAI's."""
    answer: Any = litellm.embedding(model="openai/test-model", input=["One", "Two"], **there)
    assert [(entry["index"], len(entry["embedding"]) > 0) for entry in answer.data] == [(0, True), (1, True)]
    assert answer.usage.prompt_tokens > 0


def unknown_model() -> None:
    try:
        litellm.completion(model="openai/none", messages=MESSAGES, **there)
    except litellm.NotFoundError:
        return
    raise AssertionError("a model that is not there answered")


report.run([chat, streaming, tool_call, text_completion, embeddings, unknown_model], version=version("litellm"))
