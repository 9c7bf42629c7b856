"""vLLM's ways to get token ids and scores; the remote back end of another Celeriac uses some of them."""

from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest

from dialects.openai_chat import ChatCompletionBody, ChatStream, asked_ids, from_result, to_generation_request
from dialects.openai_completions import (
    CompletionBody,
    CompletionStream,
    from_results,
    prompt_of,
    to_generation_requests,
)
from domain.catalog import ModelEntry
from domain.errors import UnsupportedParameter
from domain.jobs import FinishReason, Usage
from domain.requests import GenerationRequest, GenerationResult, ResultChoice, TokenChunk, TokenLogprob
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
    [{"prompt_logprobs": 1, "stream": True}, {"echo": True, "logprobs": 1, "return_tokens_as_token_ids": True}],
)
def test_what_cannot_be_shown_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(UnsupportedParameter, match=r"return_token|prompt_logprobs"):
        choices_of([], **fields)


SCORES = (None, TokenLogprob(token="b", token_id=2, logprob=-3.0, top=((9, "x", -0.5), (2, "b", -3.0))))

SHOWN = [
    None,
    {
        "2": {"logprob": -3.0, "rank": 2, "decoded_token": "b"},
        "9": {"logprob": -0.5, "rank": 1, "decoded_token": "x"},
    },
]


def record_of(request: GenerationRequest, num_choices: int) -> Any:
    token = TokenLogprob(token="a", token_id=5, logprob=-0.5, top=((5, "a", -0.5),))
    choices = tuple(
        ResultChoice(index=index, text="a", finish_reason=FinishReason.STOP, num_tokens=1, logprobs=(token,))
        for index in range(num_choices)
    )
    result = GenerationResult(choices=choices, usage=Usage(), prompt_logprobs=SCORES)
    job = SimpleNamespace(**vars(RUN), id=RUN.job_id)
    return SimpleNamespace(job=job, request=request, result=result, token_ids={0: [5, 6], 1: [7]})


def test_a_whole_completion_has_the_ids_and_scores_of_each_choice() -> None:
    fields = {"model": "fake", "prompt": [1, 2], "n": 2, "return_token_ids": True, "prompt_logprobs": 2}
    body = CompletionBody.model_validate(fields)
    view = load_model_view(ModelEntry(id="fake", path="none", backend="fake"))
    [generation] = to_generation_requests(body)
    assert generation.params.prompt_logprobs == 2
    answer = from_results([record_of(generation, 2)], [prompt_of(body, generation, view, 0)], None)
    assert [(choice["prompt_token_ids"], choice["token_ids"]) for choice in answer["choices"]] == [
        ((1, 2), [5, 6]),
        ((1, 2), [7]),
    ]
    assert [choice["prompt_logprobs"] for choice in answer["choices"]] == [SHOWN] * 2


def test_a_whole_chat_completion_has_them_and_a_stream_the_ids() -> None:
    messages = [{"role": "user", "content": "Hi"}]
    asked = {"return_token_ids": True, "return_tokens_as_token_ids": True, "logprobs": True, "top_logprobs": 1}
    body = ChatCompletionBody.model_validate({"model": "fake", "messages": messages, "n": 2} | asked)
    view = load_model_view(ModelEntry(id="fake", path="none", backend="fake"))
    scored = body.model_copy(update={"prompt_logprobs": 2})
    generation = to_generation_request(scored, view)
    ids = asked_ids(body, generation, view)
    assert ids.prompt
    answer = from_result(record_of(generation, 2), generation, view.output_format, ids=ids)
    assert (answer["prompt_token_ids"], answer["prompt_logprobs"]) == (ids.prompt, SHOWN)
    assert [choice["token_ids"] for choice in answer["choices"]] == [[5, 6], [7]]
    logprobs: Any = answer["choices"][0]["logprobs"]
    assert logprobs["content"][0]["token"] == logprobs["content"][0]["top_logprobs"][0]["token"] == "token_id:5"

    stream = ChatStream(RUN, generation, view.output_format, has_usage=False, service_tier=None, ids=ids)
    begun = list(stream.begin())
    assert [event.get("prompt_token_ids") for event in begun] == [ids.prompt, None]
    chunks = [
        TokenChunk(sequence_number=1, token_ids=(5,)),
        TokenChunk(sequence_number=2, token_ids=(6,), text="ab", finish_reason=FinishReason.STOP),
    ]
    events: list[Any] = [event["choices"] for chunk in chunks for event in stream.from_chunk(chunk)]
    assert [choice.get("token_ids") for [choice] in events] == [(5,), (6,), None]
    with pytest.raises(UnsupportedParameter, match="prompt_logprobs"):
        to_generation_request(scored.model_copy(update={"stream": True}), view)
