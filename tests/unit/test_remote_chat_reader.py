"""Answers of servers that take messages, put together again and read as the server took them apart."""

from typing import Any

import orjson
import pytest

from domain.requests import ChatMessage, GenerationRequest
from domain.structured_output import ToolDefinition
from gpu_worker.engine.remote.answers import ServerFailure
from gpu_worker.engine.remote.chat import ChatReader
from text.outputs import CallArguments, CallName, ContentPiece, Piece, ReasoningPiece, joined
from text.parsers import parser_of
from text.passed_on import PASSED_ON

REQUEST = GenerationRequest(
    model="m", messages=(ChatMessage(role="user", content="Go."),), tools=(ToolDefinition(name="go"),)
)
CALL = '<tool_call>\n{"name": "go", "arguments": {}}\n</tool_call>'
INVISIBLE = "\u2060"


def read(*deltas: dict[str, Any]) -> list[Piece]:
    reader = ChatReader()
    events: list[dict[str, Any]] = [{"choices": [{"delta": delta}]} for delta in deltas]
    events.append({"choices": [{"delta": {}, "finish_reason": "stop"}]})
    texts = [delta.text for event in events if (delta := reader.read(orjson.dumps(event))) is not None]
    results = []
    for pieces in (texts, ["".join(texts)], list("".join(texts))):
        parser = parser_of(REQUEST, PASSED_ON)
        results.append(joined([piece for text in pieces for piece in parser.push(text)] + parser.finish(is_cut=False)))
    assert results[0] == results[1] == results[2]
    return results[0]


def call(arguments: str, name: str | None = "go", **more: Any) -> dict[str, Any]:
    return {"function": {"arguments": arguments} | ({} if name is None else {"name": name})} | more


def calls(*arguments: str) -> list[Piece]:
    return [
        piece for number, one in enumerate(arguments) for piece in (CallName(number, "go"), CallArguments(number, one))
    ]


@pytest.mark.parametrize(
    "deltas",
    [
        pytest.param([[call('{"a": 1}', id="x")], [call('{"a": 2}', id="y")]], id="no index"),
        pytest.param([[call('{"a": 1}', id="x"), call('{"a": 2}', id="y")]], id="no index, in one event"),
        pytest.param([[call('{"a": 1}')], [call('{"a": 2}')]], id="neither index nor id"),
        pytest.param([[call('{"a": 1}', index=0, id="x")], [call('{"a": 2}', index=0, id="y")]], id="all 0"),
        pytest.param([[call('{"a": 1}', index=0), call('{"a": 2}', index=0)]], id="all 0, no id"),
        pytest.param(
            [[call("", id="x")], [call('{"a"', None)], [call(": 1}", None)], [call('{"a": 2}', id="y")]],
            id="no index, in pieces",
        ),
        pytest.param(
            [[call('{"a"', index=0, id="x")], [call(": 1}", index=0, id="x")], [call('{"a": 2}', index=1, id="y")]],
            id="the name with every piece",
        ),
        pytest.param(
            [[call('{"a"', index=0, id="x")], [call(": 1}", None, index=0, id="z")], [call('{"a": 2}', index=1)]],
            id="an id for every piece",
        ),
    ],
)  # fmt: skip
def test_calls_are_told_apart_without_an_index(deltas: list[list[dict[str, Any]]]) -> None:
    assert read(*({"tool_calls": one} for one in deltas)) == calls('{"a": 1}', '{"a": 2}')


@pytest.mark.parametrize(
    "deltas",
    [
        [call("{", index=1, id="x"), call("{}", index=0, id="y")],
        [call("{", id="x"), call("{}", id="y"), call("}", None, id="x")],
        [call("{", None, id="x")],
    ],
)
def test_calls_out_of_order_cannot_be_read(deltas: list[dict[str, Any]]) -> None:
    with pytest.raises(ServerFailure):
        read({"tool_calls": deltas})


@pytest.mark.parametrize(
    "text",
    [
        CALL,
        f"Write {CALL}, or:",
        "<think>Hm.</think> x",
        "x</think>y<tool_call",
        f"<{INVISIBLE}tool_call> <{INVISIBLE}{INVISIBLE}",
        f"1 < 2 <{INVISIBLE}<<think>",
        '{"name": "go", "arguments": {}}',
    ],
)
def test_what_a_server_quotes_is_text_wherever_its_deltas_are_cut(text: str) -> None:
    for size in (1, 2, 5, 1000):
        parts = [text[place : place + size] for place in range(0, len(text), size)]
        assert read(*({"content": part} for part in parts)) == [ContentPiece(text)]
        thoughts = [{"reasoning_content": part} for part in parts]
        assert read(*thoughts, {"content": "So."}) == [ReasoningPiece(text), ContentPiece("So.")]
        content = [{"content": f"{part}"} for part in parts]
        assert read(*content, {"tool_calls": [call("{}")]}) == [ContentPiece(text), *calls("{}")]
