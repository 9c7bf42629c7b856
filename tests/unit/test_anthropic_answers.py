"""An output as Anthropic's blocks: however a text was cut into chunks, a stream and a whole answer say the same."""

import json
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any, cast

import pytest

from dialects.anthropic_answers import MessageStream, from_result
from dialects.anthropic_fields import ANTHROPIC_HINT_TREE
from dialects.anthropic_requests import MessagesBody, to_generation_request
from dialects.bodies import parse_model
from domain.catalog import Catalog, ModelSpec
from domain.jobs import BATCH_PRIORITY, FinishReason, Usage, new_id
from domain.requests import GenerationResult, ResultChoice, TokenChunk
from storage.job_queries import JobRecord
from text.models import ModelViews
from text.outputs import OutputFormat, ReasoningFormat

FAKE = ModelViews(Catalog([ModelSpec(id="fake", path="fake", backend="fake", max_model_len=1024)])).get("fake")
FORMAT = OutputFormat("hermes", ReasoningFormat.TAGGED)
ADD = {"name": "add", "input_schema": {"type": "object", "properties": {"a": {"type": "integer"}}}}
JOB_ID = new_id()
TEXT = (
    "<think>\nHm.\n</think>\n\nSo: 🙂\n<tool_call>\n"
    '{"name": "add", "arguments": {"a": 1}}\n</tool_call>\n<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n'
    "</tool_call>"
)


def body_of(**fields: Any) -> MessagesBody:
    asked = {"model": "fake", "max_tokens": 90, "messages": [{"role": "user", "content": "Hi"}], "tools": [ADD]}
    return parse_model(json.dumps(asked | fields).encode(), MessagesBody, ANTHROPIC_HINT_TREE)


def record_of(text: str, *, priority: int = 0, **fields: Any) -> JobRecord:
    job = SimpleNamespace(id=JOB_ID, model_name="fake", priority=priority, created_at=datetime.now(UTC))
    choice = ResultChoice(index=0, text=text, **({"finish_reason": FinishReason.STOP, "num_tokens": 9} | fields))
    usage = Usage(prompt_tokens=20, completion_tokens=9, cached_tokens=16)
    return JobRecord(cast(Any, job), None, GenerationResult(choices=(choice,), usage=usage))


def streamed(text: str, body: MessagesBody, size: int, **fields: Any) -> list[dict[str, Any]]:
    record = record_of(text, **fields)
    job = SimpleNamespace(
        job_id=JOB_ID, model_name="fake", model_revision="r", priority=0, created_at=None, num_prompt_tokens=20
    )
    stream = MessageStream(cast(Any, job), to_generation_request(body, FAKE), body, FORMAT)
    events = list(stream.begin())
    parts = [text[first : first + size] for first in range(0, len(text), size)] or [""]
    for number, part in enumerate(parts, start=1):
        reason = record.result.choices[0].finish_reason if number == len(parts) else None  # type: ignore[union-attr]
        events += stream.from_chunk(TokenChunk(sequence_number=number, text=part, finish_reason=reason))
    return [dict(event) for event in [*events, *stream.finish(record)]]


def put_together(events: list[dict[str, Any]]) -> dict[str, Any]:
    """As the SDKs do. Asserts that blocks follow one another."""
    message: dict[str, Any] = dict(events[0]["message"])
    blocks: list[dict[str, Any]] = []
    is_open = False
    for event in events[1:]:
        if event["type"] == "content_block_start":
            assert (is_open, event["index"]) == (False, len(blocks))
            blocks.append(dict(event["content_block"]))
            is_open = True
        elif event["type"] == "content_block_delta":
            assert (is_open, event["index"]) == (True, len(blocks) - 1)
            for name, value in event["delta"].items():
                if name != "type":
                    blocks[-1][name] = blocks[-1].get(name, "") + value
        elif event["type"] == "content_block_stop":
            is_open = False
        elif event["type"] == "message_delta":
            message |= event["delta"]
            message["usage"] = message["usage"] | event["usage"]
    assert not is_open
    for block in blocks:
        if "partial_json" in block:
            block["input"] = json.loads(block.pop("partial_json"))
    return message | {"content": blocks}


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize("thinking", [None, {"type": "adaptive"}, {"type": "adaptive", "display": "omitted"}])
def test_a_stream_adds_up_to_the_whole_answer(size: int, thinking: dict[str, str] | None) -> None:
    body = body_of() if thinking is None else body_of(thinking=thinking)
    whole = from_result(record_of(TEXT), to_generation_request(body, FAKE), body, FORMAT)
    assert put_together(streamed(TEXT, body, size)) == whole
    kinds = [block["type"] for block in whole["content"]]
    assert kinds == ["thinking", "text", "tool_use", "tool_use"][0 if thinking else 1 :]
    assert [block["input"] for block in whole["content"] if block["type"] == "tool_use"] == [{"a": 1}, {"a": 2}]
    assert len({block["id"] for block in whole["content"] if block["type"] == "tool_use"}) == 2


def test_usage_tells_what_came_from_the_cache() -> None:
    body = body_of()
    record = record_of("Hi", priority=BATCH_PRIORITY)
    whole = from_result(record, to_generation_request(body, FAKE), body, FORMAT)
    assert whole["usage"]["input_tokens"] == 4
    assert whole["usage"]["cache_read_input_tokens"] == 16
    assert whole["usage"]["service_tier"] == "batch"


@pytest.mark.parametrize(
    ("fields", "text", "reason", "stop_sequence"),
    [
        ({}, "Hi", "end_turn", None),
        ({}, TEXT, "tool_use", None),
        ({"stop_string": "END"}, "Hi", "stop_sequence", "END"),
        ({"finish_reason": FinishReason.LENGTH, "num_tokens": 90}, TEXT[:60], "max_tokens", None),
        ({"finish_reason": FinishReason.LENGTH}, "Hi", "model_context_window_exceeded", None),
    ],
)
def test_every_end_has_its_reason(fields: dict[str, Any], text: str, reason: str, stop_sequence: str | None) -> None:
    body = body_of()
    message = put_together(streamed(text, body, 5, **fields))
    assert (message["stop_reason"], message["stop_sequence"]) == (reason, stop_sequence)


def test_an_input_that_was_cut_off_is_as_far_as_it_came() -> None:
    body = body_of()
    text = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "hal'
    record = record_of(text, finish_reason=FinishReason.LENGTH)
    [block] = from_result(record, to_generation_request(body, FAKE), body, FORMAT)["content"]
    assert block["input"] == {"a": 1}
