"""What people do with Pydantic AI, on both of its models for OpenAI's API. Asserts for itself."""

import asyncio
import os
from importlib.metadata import version
from typing import Any

from pydantic import BaseModel
from pydantic_ai import Agent, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.settings import ModelSettings

from tests.conformance.programs import report

provider = OpenAIProvider(base_url=os.environ["OPENAI_BASE_URL"], api_key=os.environ["OPENAI_API_KEY"])
settings = ModelSettings(max_tokens=30)
MODELS: Any = (OpenAIChatModel, OpenAIResponsesModel)


class Sum(BaseModel):
    """Adds."""

    a: int


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


def output_by_a_tool() -> None:
    for kind in MODELS:
        agent: Any = Agent(kind("by-hand", provider=provider), output_type=ToolOutput(Sum, name="add"))
        assert agent.run_sync("Hi").output == Sum(a=1)


report.run([two_turns, streamed, output_by_a_tool], version=version("pydantic-ai-slim"))
