"""What people do with Instructor: an object of a class of theirs. Asserts for itself."""

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


def ask(mode: Any, **options: Any) -> Any:
    client: Any = instructor.from_openai(openai.OpenAI(max_retries=0), mode=mode)
    return client.chat.completions.create(
        model="by-hand", messages=MESSAGES, response_model=add, max_retries=0, **options
    )


def tools() -> None:
    assert ask(instructor.Mode.TOOLS).a == 1


def strict_tools() -> None:
    assert ask(instructor.Mode.TOOLS_STRICT).a == 1


def tools_of_responses() -> None:
    assert ask(instructor.Mode.RESPONSES_TOOLS).a == 1


report.run([tools, strict_tools, tools_of_responses], version=version("instructor"))
