"""The input items of a response as they are listed, held to our schema and to the SDK's types."""

import re
from typing import Any
from uuid import UUID

import pytest
from openai.types.responses.response_item_list import ResponseItemList
from pydantic import TypeAdapter

from dialects.openai_response_items import ResponseInput, listed_items
from dialects.openai_response_objects import InputItemListView

JOB_ID = UUID(int=1)
PART = {"type": "text", "text": "Hi"}
SENT = {"type": "input_text", "text": "Hi"}
SAID = {"type": "output_text", "text": "Hi", "annotations": []}
CALL = {"type": "function_call", "call_id": "call_1", "name": "add", "arguments": "{}"}
RESULT = {"type": "function_call_output", "call_id": "call_1"}


@pytest.mark.parametrize(
    ("item", "shown"),
    [
        ({"role": "user", "content": "Hi"}, {"content": [SENT]}),
        ({"role": "developer", "content": [PART]}, {"content": [SENT]}),
        ({"role": "user", "content": [{"type": "input_text"}]}, {"content": [SENT | {"text": ""}]}),
        ({"role": "assistant", "content": "Hi"}, {"content": [SAID]}),
        ({"role": "assistant", "content": [PART]}, {"content": [SAID]}),
        ({"role": "assistant", "content": [SAID | {"logprobs": []}], "phase": "commentary"}, {"phase": "commentary"}),
        ({"role": "assistant", "content": [{"type": "refusal", "refusal": "No"}]}, {}),
        (CALL, CALL),
        (RESULT | {"output": "3"}, {"output": "3"}),
        (RESULT | {"output": [PART]}, {"output": [SENT]}),
        ({"type": "reasoning"}, {"summary": []}),
        ({"type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm."}], "status": "incomplete"}, {}),
    ],
)
def test_an_item_is_listed_as_the_sdk_knows_it(item: dict[str, Any], shown: dict[str, Any]) -> None:
    parsed = TypeAdapter[Any](ResponseInput).validate_python([item])
    [listed] = listed_items(JOB_ID, parsed)
    assert shown.items() <= listed.items()
    page = {"object": "list", "data": [listed], "first_id": "a", "last_id": "a", "has_more": False}
    TypeAdapter(InputItemListView).validate_python(page)
    ResponseItemList.model_validate(page)


def test_each_listed_item_has_an_id_of_its_own_that_paths_can_hold() -> None:
    given = ["mine", "mine", "", "a/b", "a\n", None]
    parsed = TypeAdapter[Any](ResponseInput).validate_python(
        [{"role": "user", "content": "Hi"} | ({} if id_ is None else {"id": id_}) for id_ in given]
    )
    ids = [item["id"] for item in listed_items(JOB_ID, parsed)]
    assert ids[0] == "mine"
    assert len(set(ids)) == len(given)
    assert all(re.fullmatch("[A-Za-z0-9_-]{1,128}", id_) for id_ in ids)
    assert ids == [item["id"] for item in listed_items(JOB_ID, parsed)], "pages agree"
