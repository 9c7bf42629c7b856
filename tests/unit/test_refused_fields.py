"""Refusals that come after a body was translated to our request: they name the body's fields, on every route."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from api.tokens import TokenizeBody
from dialects import anthropic_requests, openai_chat, openai_compaction, openai_embeddings, openai_response_requests
from dialects.anthropic_requests import MessagesBody
from dialects.bodies import parse_model
from dialects.openai_chat import ChatCompletionBody
from dialects.openai_compaction import CompactBody
from dialects.openai_embeddings import EmbeddingBody
from dialects.openai_response_requests import ResponseBody
from dialects.scores import RerankBody, ScoreBody, to_rerank_request, to_score_request
from domain.catalog import ModelSpec
from domain.errors import InvalidRequest
from settings import ROOT
from text.models import ModelView, load_model_view

LONG = "x" * 600_000
TWICE = [{"type": "text", "text": LONG}] * 2
USER = {"role": "user", "content": "x"}


@pytest.fixture(scope="module")
def view() -> ModelView:
    return load_model_view(ModelSpec(id="m", path=str(ROOT / "models" / "celeriac-mini"), max_model_len=1024))


ROUTES: dict[str, tuple[type[Any], Callable[[Any, ModelView], object]]] = {
    "chat": (ChatCompletionBody, openai_chat.to_generation_request),
    "responses": (ResponseBody, openai_response_requests.to_generation_request),
    "compact": (CompactBody, lambda body, view: openai_compaction.to_summary_request(body, view, [])),
    "anthropic": (MessagesBody, anthropic_requests.to_generation_request),
    "tokenize": (TokenizeBody, TokenizeBody.to_request),
    "embeddings": (EmbeddingBody, openai_embeddings.to_embedding_request),
    "rerank": (RerankBody, lambda body, view: to_rerank_request(body, view.spec)),
    "score": (ScoreBody, lambda body, view: to_score_request(body, view.spec)),
}


def called(**fields: Any) -> dict[str, Any]:
    function = {"name": "f", "arguments": "{}"} | fields
    return {"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "function": function}]}


def answered(*blocks: dict[str, Any]) -> dict[str, Any]:
    return {"max_tokens": 1, "messages": [USER, {"role": "assistant", "content": [*blocks]}]}


TEXT = {"type": "text", "text": "x"}
USE = {"type": "tool_use", "id": "c", "name": "f", "input": {}}


@pytest.mark.parametrize(
    ("route", "fields", "param"),
    [
        ("chat", {"messages": [USER], "max_completion_tokens": 10**9}, "max_completion_tokens"),
        ("chat", {"messages": [USER, called(arguments=LONG + LONG)]}, "messages.1.tool_calls.0.function.arguments"),
        ("chat", {"messages": [USER, called(name="a b")]}, "messages.1.tool_calls.0.function.name"),
        ("chat", {"messages": [USER, {"role": "user", "content": TWICE}]}, "messages.1.content"),
        ("tokenize", {"messages": [called(arguments=LONG + LONG)]}, "messages.0.tool_calls.0.function.arguments"),
        ("responses", {"input": [{"role": "user", "content": TWICE}]}, "input"),
        ("responses", {"input": "x", "max_output_tokens": 10**9}, "max_output_tokens"),
        ("compact", {"input": [{"role": "user", "content": TWICE}]}, "input"),
        ("compact", {"input": [{"role": "user", "content": LONG}] * 2}, "input"),
        ("anthropic", {"max_tokens": 1, "system": TWICE, "messages": [USER]}, "system"),
        ("anthropic", {"max_tokens": 1, "system": "s", "messages": [USER | {"content": TWICE}]}, "messages.0.content"),
        ("anthropic", answered(TEXT, USE | {"input": {"a": LONG + LONG}}), "messages.1.content.1.input"),
        ("anthropic", answered(TEXT, USE, USE | {"id": "c" * 200}), "messages.1.content.2.id"),
        ("anthropic", answered({"type": "thinking", "thinking": LONG + LONG, "signature": ""}), "messages.1.content"),
        ("embeddings", {"input": [LONG, LONG]}, "input"),
        ("embeddings", {"input": ["x", ""]}, "input.1"),
        ("rerank", {"query": LONG, "documents": [LONG]}, "documents"),
        ("score", {"text_1": LONG, "text_2": LONG}, "text_2"),
    ],
)
def test_a_refusal_names_the_bodys_own_field(route: str, fields: dict[str, Any], param: str, view: ModelView) -> None:
    model, translate = ROUTES[route]
    body = parse_model(json.dumps({"model": "m"} | fields).encode(), model)
    with pytest.raises(InvalidRequest) as refused:
        translate(body, view)
    assert refused.value.param == param
    assert param.split(".")[-1] in refused.value.message
