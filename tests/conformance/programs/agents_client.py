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
    """For Responses with a tool: the SDK raises if a streamed response is cut off by its limit, as these are."""

    async def run(asked: Any) -> Any:
        answer = Runner.run_streamed(asked, "Hi")
        names = [event.type async for event in answer.stream_events()]
        assert names.count("raw_response_event") > 2
        return answer.final_output

    assert asyncio.run(run(agent(OpenAIChatCompletionsModel, "test-model", model_settings=settings)))
    calling = agent(OpenAIResponsesModel, "by-hand", tools=[add], tool_use_behavior="stop_on_first_tool")
    assert asyncio.run(run(calling)) == "2"


def tool_call() -> None:
    for kind in MODELS:
        calling = agent(kind, "by-hand", tools=[add], tool_use_behavior="stop_on_first_tool")
        assert asyncio.run(Runner.run(calling, "Hi")).final_output == "2"


def second_turn() -> None:
    """What an answer becomes can be sent back."""

    async def run(kind: Any) -> Any:
        asked = agent(kind, "test-model", model_settings=settings)
        first = await Runner.run(asked, "Hi")
        return await Runner.run(asked, [*first.to_input_list(), {"role": "user", "content": "And?"}])

    for kind in MODELS:
        assert asyncio.run(run(kind)).final_output


report.run([whole, streamed, tool_call, second_turn], version=version("openai-agents"))
