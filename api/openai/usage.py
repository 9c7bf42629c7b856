"""What a job used, in the words of the routes."""

from collections.abc import Sequence
from typing import Any

from api.openai.output_parsing import OutputParser
from domain.jobs import Usage
from domain.requests import ResultChoice
from tasks.output_formats import END_THINK


def usage_object(usage: Usage, *, num_reasoning_tokens: int = 0) -> dict[str, object]:
    """Of chat completions and completions."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": num_reasoning_tokens},
    }


def response_usage(usage: Usage, *, num_reasoning_tokens: int) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": num_reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def count_reasoning_tokens(choices: Sequence[ResultChoice], parsers: Sequence[OutputParser]) -> int:
    """The tokens of all choices up to and including the one that completes </think>; all of a choice that was still
    thinking when it ended. `parsers`, by index, have taken the whole text of their choices."""
    return sum(_of_choice(choice) for choice in choices if parsers[choice.index].has_reasoning)


def _of_choice(choice: ResultChoice) -> int:
    if choice.num_reasoning_tokens is not None:
        return choice.num_reasoning_tokens
    return choice.num_tokens if END_THINK not in choice.text else 0  # an older job, of which nobody counted them
