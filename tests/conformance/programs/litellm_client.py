"""What people do with LiteLLM as a client. Asserts for itself."""

import asyncio
import json
import os
from importlib.metadata import version
from typing import Any

import litellm
import yaml

from tests.conformance.programs import report
from tests.recipes import program

MESSAGES = [{"role": "user", "content": "Hi"}]
ADD: Any = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
CACHED = {"type": "ephemeral"}
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


async def bridge(model: str, **options: Any) -> Any:
    asked: Any = {"max_tokens": 30, "messages": MESSAGES, "api_base": there["api_base"], "api_key": there["api_key"]}
    return await litellm.anthropic.messages.acreate(model=f"openai/{model}", **(asked | options))


def anthropic_bridge() -> None:
    """Anthropic's Messages over our OpenAI routes, as Claude Code has them through LiteLLM."""
    whole = asyncio.run(bridge("test-model", system=[{"type": "text", "text": "x", "cache_control": CACHED}]))
    assert whole["content"][0]["text"]
    assert whole["usage"]["output_tokens"] == 30


def anthropic_bridge_tool() -> None:
    tool = {"name": "add", "description": "x", "input_schema": ADD["function"]["parameters"], "cache_control": CACHED}
    whole = asyncio.run(bridge("by-hand", tools=[tool]))
    [call] = [block for block in whole["content"] if block["type"] == "tool_use"]
    assert (call["name"], call["input"]) == ("add", {"a": 1})
    assert whole["stop_reason"] == "tool_use"


def router_of_the_recipe() -> None:
    """The file of docs/recipes.md for LiteLLM's proxy, read as the proxy reads it."""
    config = yaml.safe_load(program("LiteLLM's proxy in front", "yaml"))
    answer: Any = litellm.Router(**config).completion("stories", MESSAGES, max_tokens=8)
    assert answer.choices[0].message.content
    stream: Any = litellm.Router(**config).completion("stories", MESSAGES, max_tokens=8, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream)


report.run(
    [
        *(chat, streaming, tool_call, text_completion, embeddings, unknown_model),
        *(anthropic_bridge, anthropic_bridge_tool, router_of_the_recipe),
    ],
    version=version("litellm"),
)
