"""A call that must be made is held to the tool's schema, in the words in which its model calls."""

from typing import Any

import pytest
from llguidance import LLMatcher

from dialects.tools import (
    callable_tool,
)
from domain.catalog import ModelSpec
from domain.structured_output import StructuredOutput, ToolCalls, ToolDefinition
from settings import ROOT
from text.grammars import make_grammar_tokenizer, make_matcher
from text.models import ModelView, load_model_view

NODE: dict[str, Any] = {
    "type": "object",
    "properties": {"at": {"$ref": "#/$defs/point"}},
    "required": ["at"],
    "additionalProperties": False,
    "$defs": {"point": {"type": "integer"}},
}
TOOLS = tuple(
    callable_tool(tool, place="tools")
    for tool in (ToolDefinition(name="go", parameters=NODE), ToolDefinition(name="stop"))
)
GO, STOP = '{"name": "go", "arguments": {"at":3}}', '{"name": "stop", "arguments": {}}'
HERMES, MISTRAL, LLAMA3 = "hermes", "mistral", "llama3"

CASES: list[tuple[str, int | None, str, bool]] = [
    (HERMES, None, f"<tool_call>\n{GO}\n</tool_call>", True),
    (HERMES, None, f"<tool_call>\n{GO}\n</tool_call>\n<tool_call>\n{STOP}\n</tool_call>", True),
    (HERMES, 1, f"<tool_call>\n{GO}\n</tool_call>\n<tool_call>\n{STOP}\n</tool_call>", False),
    (HERMES, None, f"Well. <tool_call>\n{GO}\n</tool_call>", False),
    (HERMES, None, "<tool_call>\n" + GO.replace("3", '"3"') + "\n</tool_call>", False),
    (HERMES, None, "<tool_call>\n" + GO.replace("go", "run") + "\n</tool_call>", False),
    (MISTRAL, None, f"[{GO}, {STOP}]", True),
    (MISTRAL, None, "[]", False),
    (LLAMA3, None, GO.replace("arguments", "parameters"), True),
    (LLAMA3, None, GO, False),
]


@pytest.fixture(scope="module")
def view() -> ModelView:
    return load_model_view(ModelSpec(id="mini", path=str(ROOT / "models" / "celeriac-mini"), max_model_len=1024))


def matcher_of(view: ModelView, output: StructuredOutput) -> LLMatcher:
    vocabulary = view.vocabulary
    assert vocabulary is not None
    tokenizer = make_grammar_tokenizer(vocabulary.tokenizer.to_str(), view.vocab_size, vocabulary.eos_token_ids)
    matcher = make_matcher(tokenizer, output)
    assert not matcher.is_error(), matcher.get_error()
    return matcher


@pytest.mark.parametrize(("format", "max_calls", "text", "is_allowed"), CASES)
def test_only_calls_of_the_tools_can_be_written(
    view: ModelView, format: str, max_calls: int | None, text: str, is_allowed: bool
) -> None:
    matcher = matcher_of(view, StructuredOutput(calls=ToolCalls(format=format, tools=TOOLS, is_single=max_calls == 1)))
    token_ids = view._encoder.encode(text, add_special_tokens=False)
    is_whole = matcher.try_consume_tokens(token_ids) == len(token_ids)
    assert (is_whole and matcher.is_accepting()) == is_allowed


def test_a_model_may_write_its_marker_before_calls_and_nowhere_else(view: ModelView) -> None:
    marker = 2  # a special token, of which no text shows
    calls = ToolCalls(format=MISTRAL, tools=TOOLS, marker_token_id=marker)
    output = StructuredOutput(calls=calls, json_schema={"type": "array", "items": {"type": "integer"}})
    call, answer = (view._encoder.encode(text, add_special_tokens=False) for text in (f"[{GO}]", "[3]"))
    for token_ids, is_allowed in (
        ([marker, *call], True),
        (call, True),
        (answer, True),
        ([marker, *answer], False),
        ([*call, marker], False),
    ):
        matcher = matcher_of(view, output)
        is_whole = matcher.try_consume_tokens(token_ids) == len(token_ids)
        assert (is_whole and matcher.is_accepting()) == is_allowed
