"""vLLM's ways to get token ids from /v1/completions, which the remote back end of another Celeriac uses."""

from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest

from dialects.openai_completions import CompletionBody, CompletionStream, prompt_of, to_generation_requests
from domain.catalog import ModelEntry
from domain.errors import UnsupportedParameter
from domain.jobs import FinishReason
from domain.requests import TokenChunk, TokenLogprob
from gpu_worker.engine.remote.answers import Delta, ScoredToken, _delta_of
from text.models import load_model_view

RUN: Any = SimpleNamespace(
    job_id=UUID(int=7), model_name="fake", model_revision="r", priority=0, created_at=datetime(2026, 1, 1, tzinfo=UTC)
)


def choices_of(chunks: list[TokenChunk], **fields: Any) -> list[Any]:
    body = CompletionBody.model_validate({"model": "fake", "prompt": [1, 2], "stream": True} | fields)
    view = load_model_view(ModelEntry(id="fake", path="none", backend="fake"))
    [generation] = to_generation_requests(body)
    stream = CompletionStream(RUN, prompt_of(body, generation, view, 0), has_usage=False, service_tier=None)
    events: list[Any] = [event for chunk in chunks for event in stream.from_chunk(chunk)]
    return [event["choices"][0] for event in events]


def test_each_chunk_has_its_ids_even_one_without_text_and_the_first_those_of_the_prompt() -> None:
    chunks = [
        TokenChunk(sequence_number=1, token_ids=(5,)),
        TokenChunk(sequence_number=2, token_ids=(6, 7), text="ab", finish_reason=FinishReason.LENGTH),
    ]
    first, last = choices_of(chunks, return_token_ids=True)
    assert (first["prompt_token_ids"], first["token_ids"]) == ((1, 2), (5,))
    assert (last["prompt_token_ids"], last["token_ids"]) == (None, (6, 7))
    [only] = choices_of(chunks)
    assert "token_ids" not in only


def test_logprobs_name_tokens_by_id_so_that_the_remote_back_end_can_read_them() -> None:
    logprob = TokenLogprob(token="a", token_id=5, logprob=-0.5, top=((9, "a", -0.25), (5, "a", -0.5)))
    chunk = TokenChunk(sequence_number=1, token_ids=(5,), text="a", logprobs=(logprob,))
    asked = {"logprobs": 2, "return_token_ids": True, "return_tokens_as_token_ids": True}
    [choice] = choices_of([chunk], **asked)
    assert choice["logprobs"]["tokens"] == ["token_id:5"]
    read = _delta_of(choice | {"token_ids": list(choice["token_ids"])})
    assert read == Delta([5], "a", [ScoredToken(-0.5, ((9, -0.25), (5, -0.5)))])


@pytest.mark.parametrize(
    "fields",
    [{"stream": False, "return_token_ids": True}, {"echo": True, "logprobs": 1, "return_tokens_as_token_ids": True}],
)
def test_ids_where_there_are_none_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(UnsupportedParameter, match="return_token"):
        choices_of([], **fields)
