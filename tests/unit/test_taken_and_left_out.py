"""What is left out of a body is left out on every way into it: a line of a batch, and tools that must not be called."""

import json
from typing import Any

import pytest

from dialects.openai_batches import read_line
from dialects.tools import (
    AskedTools,
    tools_of,
)
from domain.catalog import Catalog, ModelSpec
from domain.errors import UnsupportedParameter
from domain.requests import GenerationRequest
from settings import ROOT
from text.models import ModelViews

FAKE = ModelViews(Catalog([ModelSpec(id="fake", path="fake", backend="fake", max_model_len=64)]))
CHAT: dict[str, Any] = {"model": "fake", "messages": [{"role": "user", "content": "Hi"}]}


def request_of(body: dict[str, Any]) -> GenerationRequest:
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    request = read_line(json.dumps(line).encode(), "/v1/chat/completions", FAKE).request
    assert isinstance(request, GenerationRequest)
    return request


def test_a_line_of_a_batch_takes_nulls_and_hints() -> None:
    odd = CHAT | {"no_such_field": None, "client_metadata": {"a": "b"}, "stream_options": None, "top_k": -1}
    odd["messages"] = [CHAT["messages"][0] | {"cache_control": {"type": "ephemeral"}, "refusal": None}]
    assert request_of(odd) == request_of(CHAT | {"top_k": 0})


def test_tools_that_must_not_be_called_need_no_template() -> None:
    view = ModelViews(Catalog.load(ROOT / "models.toml")).get("celeriac-mini")
    assert view.output_format.tools is None
    tools = {0: {"name": "f"}}
    assert tools_of(AskedTools(tools, "tools.{}", mode="none"), view) == ()
    with pytest.raises(UnsupportedParameter):
        tools_of(AskedTools(tools, "tools.{}", mode="auto"), view)
