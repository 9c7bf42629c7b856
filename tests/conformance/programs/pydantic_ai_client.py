"""What people do with Pydantic AI, on both of its models for OpenAI's API. Asserts for itself."""

import asyncio
import os
from contextlib import suppress
from importlib.metadata import version
from typing import Any

from pydantic_ai import Agent
from pydantic_ai.exceptions import UsageLimitExceeded
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.settings import ModelSettings
from pydantic_ai.usage import UsageLimits

from tests.conformance.programs import report

provider = OpenAIProvider(base_url=os.environ["OPENAI_BASE_URL"], api_key=os.environ["OPENAI_API_KEY"])
settings = ModelSettings(max_tokens=30)
MODELS: Any = (OpenAIChatModel, OpenAIResponsesModel)


def two_turns() -> None:
    for kind in MODELS:
        agent = Agent(kind("test-model", provider=provider), model_settings=settings)
        first = agent.run_sync("Hi")
        assert first.output
        assert agent.run_sync("And?", message_history=first.all_messages()).output


def streamed() -> None:
    async def run(kind: Any) -> None:
        agent = Agent(kind("test-model", provider=provider), model_settings=settings)
        async with agent.run_stream("Hi") as answer:
            parts = [part async for part in answer.stream_text(delta=True, debounce_by=None)]
        assert len(parts) > 1

    for kind in MODELS:
        asyncio.run(run(kind))


def tool_call() -> None:
    """One request only: this model would call the tool for ever."""
    called: list[int] = []

    def add(a: int) -> str:
        """Adds one."""
        called.append(a)
        return str(a + 1)

    for kind in MODELS:
        agent = Agent(kind("by-hand", provider=provider), tools=[add])
        with suppress(UsageLimitExceeded):
            agent.run_sync("Hi", usage_limits=UsageLimits(request_limit=1))
    assert called == [1, 1]


report.run([two_turns, streamed, tool_call], version=version("pydantic-ai-slim"))
