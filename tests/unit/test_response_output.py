"""The events of a response, judged by the SDK's own strict reader."""

from itertools import pairwise
from typing import Any
from uuid import UUID

import openai
from hypothesis import given
from hypothesis import strategies as st
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import Response, ResponseCompletedEvent, ResponseCreatedEvent, ResponseStreamEvent
from pydantic import TypeAdapter

from dialects.openai_response_output import OutputItem, ResponseEvent, ResponseOutput
from text.outputs import OutputFormat, OutputParser, ReasoningFormat

JOB_ID = UUID(int=1)
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": [2, "}"]}}\n</tool_call>'
TEXT = f"<think>Add them, I think.</think>\n\nLet me see 🙂.\n{CALL}\n{CALL}"
FORMAT = OutputFormat("hermes", ReasoningFormat.TAGGED)


def told(text: str, cuts: list[int], status: str = "completed") -> tuple[list[ResponseEvent], list[OutputItem]]:
    """The events of a text that comes in pieces, and the items that they amount to."""
    output = ResponseOutput(JOB_ID, OutputParser(FORMAT, tool_names=frozenset({"add"})))
    places = [0, *sorted(cuts), len(text)]
    events = [event for start, stop in pairwise(places) for event in output.push(text[start:stop])]
    return [*events, *output.finish(status)], output.items


def read_by_sdk(events: list[ResponseEvent], items: list[OutputItem]) -> Response:
    """What the SDK's stream helper makes of them; it raises where they break its rules."""
    state: ResponseStreamState[Any] = ResponseStreamState(input_tools=[], text_format=openai.omit)
    head: dict[str, Any] = {"id": "resp_1", "object": "response", "created_at": 0, "model": "m", "output": []}
    head |= {"parallel_tool_calls": True, "tool_choice": "auto", "tools": []}
    state.handle_event(ResponseCreatedEvent(type="response.created", sequence_number=0, response=Response(**head)))
    adapter: TypeAdapter[ResponseStreamEvent] = TypeAdapter(ResponseStreamEvent)
    for number, event in enumerate(events, start=1):
        state.handle_event(adapter.validate_python({**event, "sequence_number": number}))
    final = Response.model_validate(head | {"output": items})
    state.handle_event(ResponseCompletedEvent(type="response.completed", sequence_number=999, response=final))
    return final


@given(st.lists(st.integers(min_value=0, max_value=len(TEXT)), max_size=30))
def test_however_the_text_is_cut_the_items_are_the_same(cuts: list[int]) -> None:
    events, items = told(TEXT, cuts)
    assert [item["type"] for item in items] == ["reasoning", "message", "function_call", "function_call"]
    assert items == told(TEXT, [])[1]
    assert items[0]["content"][0]["text"] == "Add them, I think."
    assert items[1]["content"][0]["text"] == "Let me see 🙂."
    assert items[2]["arguments"] == '{"a": 1, "b": [2, "}"]}'
    assert len({item["id"] for item in items}) == 4
    assert items[2]["call_id"] != items[3]["call_id"]
    read_by_sdk(events, items)


@given(st.integers(min_value=0, max_value=len(TEXT)), st.lists(st.integers(min_value=0, max_value=len(TEXT))))
def test_a_text_that_was_cut_off_still_closes_what_it_opened(length: int, cuts: list[int]) -> None:
    events, items = told(TEXT[:length], [cut for cut in cuts if cut <= length], "incomplete")
    opened = [event["output_index"] for event in events if event["type"] == "response.output_item.added"]
    closed = [event["output_index"] for event in events if event["type"] == "response.output_item.done"]
    assert opened == closed == list(range(len(items)))
    assert all(item["status"] == "completed" for item in items[:-1])
    assert all(item["status"] == "incomplete" for item in items[-1:])


def test_an_empty_answer_is_an_empty_message() -> None:
    events, items = told("", [])
    assert [item["type"] for item in items] == ["message"]
    assert read_by_sdk(events, items).output_text == ""
