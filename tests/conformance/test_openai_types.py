"""Whole answers of the OpenAI routes, held to the SDK's own types, which its client does not do, and to our schemas."""

from typing import Any

import httpx
from openai.types import Batch, CreateEmbeddingResponse, FileObject
from openai.types.conversations import (
    Conversation,
    ConversationDeletedResource,
    ConversationItem,
    ConversationItemList,
)
from openai.types.responses import Response
from openai.types.responses.response_item_list import ResponseItemList
from pydantic import TypeAdapter

from api.openai.batches import BatchListView, BatchView
from api.openai.files import FileListView, FileView
from dialects.openai_conversations import ConversationView, DeletedConversationView
from dialects.openai_embeddings import EmbeddingListView
from dialects.openai_response_objects import InputItemListView, InputItemView, ResponseView
from tests.conformance.harness import Served
from tests.integration.runner_harness import MODEL

BODIES: list[dict[str, Any]] = [
    {},
    {"background": True},
    {"metadata": {"a": "b"}, "user": "me", "instructions": "Be short.", "service_tier": "flex"},
    {"include": ["message.output_text.logprobs"], "top_logprobs": 2, "text": {"format": {"type": "text"}}},
    {"input": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]},
]


def test_responses_are_of_the_sdks_type(served: Served) -> None:
    with served.server.client() as client:
        for fields in BODIES:
            body = {"model": MODEL, "input": "Hi", "max_output_tokens": 3} | fields
            answer = judged(client.post("/v1/responses", json=body), ResponseView, Response)
            judged(client.get(f"/v1/responses/{answer['id']}"), ResponseView, Response)
            judged(client.get(f"/v1/responses/{answer['id']}/input_items"), InputItemListView, ResponseItemList)


def test_conversations_are_of_the_sdks_types(served: Served) -> None:
    items: list[dict[str, Any]] = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?", "phase": "final_answer"},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "3"}]},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm."}], "encrypted_content": "x"},
    ]
    with served.server.client() as client:
        conversation = judged(client.post("/v1/conversations", json={"metadata": {"a": "b"}}), Conversation)
        path = f"/v1/conversations/{conversation['id']}"
        judged(client.post(f"{path}/items", json={"items": items}), InputItemListView, ConversationItemList)
        body = {"model": MODEL, "input": "Hi", "max_output_tokens": 3, "conversation": {"id": conversation["id"]}}
        judged(client.post("/v1/responses", json=body), ResponseView, Response)
        listed = judged(client.get(f"{path}/items"), InputItemListView, ConversationItemList)
        assert len(listed["data"]) == 7
        for item in listed["data"]:
            judged(client.get(f"{path}/items/{item['id']}"), InputItemView, ConversationItem)
        judged(client.delete(f"{path}/items/{listed['first_id']}"), ConversationView, Conversation)
        judged(client.post(path, json={"metadata": None}), ConversationView, Conversation)
        judged(client.delete(path), DeletedConversationView, ConversationDeletedResource)


def test_embeddings_files_and_batches_are_of_the_sdks_types(served: Served) -> None:
    with served.server.client() as client:
        body = {"model": MODEL, "input": ["Hi", "You"]}
        judged(client.post("/v1/embeddings", json=body), EmbeddingListView, CreateEmbeddingResponse)
        form: Any = {"files": {"file": ("a.jsonl", b"{}\n")}, "data": {"purpose": "batch"}}
        file = judged(client.post("/v1/files", **form), FileView, FileObject)
        ask = {"input_file_id": file["id"], "endpoint": "/v1/responses", "completion_window": "24h"}
        batch = judged(client.post("/v1/batches", json=ask), BatchView, Batch)
        judged(client.post(f"/v1/batches/{batch['id']}/cancel"), BatchView, Batch)
        judged(client.get("/v1/files"), FileListView)
        judged(client.get("/v1/batches"), BatchListView)


def judged(answer: httpx.Response, *types: Any) -> dict[str, Any]:
    """The body of an answer of 200. Raises ValidationError."""
    assert answer.status_code == 200, answer.text
    for type_ in types:
        TypeAdapter(type_).validate_python(answer.json())
    return dict(answer.json())
