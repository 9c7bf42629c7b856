"""What people do with OpenAI's Agents SDK, on both of its models. Asserts for itself."""

import asyncio
from importlib.metadata import version
from typing import Any

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI

from tests.conformance.programs import report

set_tracing_disabled(True)
settings = ModelSettings(max_tokens=8)
MODELS = (OpenAIChatCompletionsModel, OpenAIResponsesModel)


@function_tool
def add(a: int) -> str:
    """Adds one."""
    return str(a + 1)


def agent(kind: Any, model: str, **options: Any) -> Any:
    client = AsyncOpenAI(max_retries=0)
    return Agent(name="a", instructions="Be brief.", model=kind(model=model, openai_client=client), **options)


def whole() -> None:
    for kind in MODELS:
        answer = asyncio.run(Runner.run(agent(kind, "test-model", model_settings=settings), "Hi"))
        assert answer.final_output
        assert answer.context_wrapper.usage.output_tokens == 8


def streamed() -> None:
    async def run(kind: Any) -> None:
        answer = Runner.run_streamed(agent(kind, "test-model", model_settings=settings), "Hi")
        names = [event.type async for event in answer.stream_events()]
        assert names.count("raw_response_event") > 2
        assert answer.final_output

    for kind in MODELS:
        asyncio.run(run(kind))


def tool_call() -> None:
    for kind in MODELS:
        calling = agent(kind, "by-hand", tools=[add], tool_use_behavior="stop_on_first_tool")
        assert asyncio.run(Runner.run(calling, "Hi")).final_output == "2"


def second_turn() -> None:
    """What an answer becomes can be sent back."""
    for kind in MODELS:
        asked = agent(kind, "test-model", model_settings=settings)
        first = asyncio.run(Runner.run(asked, "Hi"))
        second = asyncio.run(Runner.run(asked, [*first.to_input_list(), {"role": "user", "content": "And?"}]))
        assert second.final_output


report.run([whole, streamed, tool_call, second_turn], version=version("openai-agents"))
