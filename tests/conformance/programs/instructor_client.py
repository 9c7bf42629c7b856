"""What people do with Instructor: an object of a class of theirs. Asserts for itself."""

from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

import instructor
import openai
from pydantic import BaseModel

from tests.conformance.programs import report

MESSAGES = [{"role": "user", "content": "Hi"}]


class add(BaseModel):  # Instructor names the tool after the class, and the worker calls this one
    """Adds."""

    a: int


def parallel_tools() -> None:
    """The mode that lets the model choose; the others need a model that can be held to a grammar, which this is not."""
    client: Any = instructor.from_openai(openai.OpenAI(max_retries=0), mode=instructor.Mode.PARALLEL_TOOLS)
    asked: Any = {"model": "by-hand", "messages": MESSAGES, "response_model": Iterable[add], "max_retries": 0}
    assert [one.a for one in client.chat.completions.create(**asked)] == [1]


report.run([parallel_tools], version=version("instructor"))
