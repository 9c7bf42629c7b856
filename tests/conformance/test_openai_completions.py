"""The older completions through the unmodified SDK: many prompts, echo, logprobs, scoring, candidates, streams."""

from typing import Any

import openai
import pytest

from domain.jobs import parse_id
from gpu_worker.engine.fake_tokens import fake_text
from tests.conformance.harness import Served

MODEL = "test-model"


def said(served: Served, job_id: str, prompt: str, num_tokens: int, index: int = 0) -> str:
    return fake_text(list(prompt.encode()), served.rig.job(parse_id(job_id)).seed, index, num_tokens)


def job_ids(raw: Any) -> list[str]:
    return str(raw.headers["x-job-ids"]).split(",")


def test_a_prompt_is_continued(served: Served) -> None:
    answer = served.client.completions.create(model=MODEL, prompt="Once", max_tokens=5)
    assert answer.id.startswith("cmpl-")
    assert answer.object == "text_completion"
    assert answer.choices[0].text == said(served, answer.id, "Once", 5)
    assert answer.choices[0].finish_reason == "length"
    default = served.client.completions.create(model=MODEL, prompt=list(b"Once"))
    assert default.usage is not None
    assert default.usage.completion_tokens == 16
    assert default.choices[0].text == said(served, default.id, "Once", 16)


@pytest.mark.parametrize("prompts", [["One", "Two", "Six"], [list(b"One"), list(b"Two"), list(b"Six")]])
def test_choices_are_numbered_prompt_by_prompt(served: Served, prompts: Any) -> None:
    raw = served.client.completions.with_raw_response.create(model=MODEL, prompt=prompts, max_tokens=4, n=2)
    answer = raw.parse()
    assert [choice.index for choice in answer.choices] == list(range(6))
    texts = [
        said(served, job_id, prompt, 4, index)
        for job_id, prompt in zip(job_ids(raw), ("One", "Two", "Six"), strict=True)
        for index in (0, 1)
    ]
    assert [choice.text for choice in answer.choices] == texts
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (9, 24)


def test_a_stream_of_several_prompts_comes_to_the_same(served: Served) -> None:
    raw = served.client.completions.with_raw_response.create(
        model=MODEL, prompt=["One", "Two"], max_tokens=6, stream=True, echo=True, stream_options={"include_usage": True}
    )
    chunks = list(raw.parse())
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 12
    for number, (job_id, prompt) in enumerate(zip(job_ids(raw), ("One", "Two"), strict=True)):
        own = [choice for chunk in chunks for choice in chunk.choices if choice.index == number]
        assert "".join(choice.text for choice in own) == prompt + said(served, job_id, prompt, 6)
        assert own[-1].finish_reason == "length"


def test_scoring_a_prompt_returns_its_logprobs_and_nothing_else(served: Served) -> None:
    answer = served.client.completions.create(model=MODEL, prompt="Once", max_tokens=0, echo=True, logprobs=2)
    [choice] = answer.choices
    assert choice.text == "Once"
    logprobs = choice.logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.top_logprobs is not None
    assert logprobs.token_logprobs[0] is None
    assert all(value is not None and value <= 0 for value in logprobs.token_logprobs[1:])
    assert logprobs.text_offset is not None
    assert logprobs.text_offset[0] == 0
    assert len(logprobs.tokens or []) == len(logprobs.top_logprobs) == len(logprobs.text_offset) == 4


def test_logprobs_of_what_was_written(served: Served) -> None:
    answer = served.client.completions.create(model=MODEL, prompt="Once", max_tokens=3, logprobs=1)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert "".join(logprobs.tokens or []) == answer.choices[0].text
    assert [
        answer.choices[0].text[at:][: len(token)]
        for at, token in zip(logprobs.text_offset or [], logprobs.tokens or [], strict=True)
    ] == logprobs.tokens


def test_the_best_of_several(served: Served) -> None:
    answer = served.client.completions.create(model=MODEL, prompt="Once", max_tokens=4, best_of=4, n=2)
    assert [choice.index for choice in answer.choices] == [0, 1]
    candidates = [said(served, answer.id, "Once", 4, index) for index in range(4)]
    assert all(choice.text in candidates for choice in answer.choices)


def test_a_key_holds_for_all_prompts(served: Served) -> None:
    options: Any = {
        "model": MODEL,
        "prompt": ["One", "One"],
        "max_tokens": 3,
        "extra_headers": {"Idempotency-Key": "k"},
    }
    first = served.client.completions.with_raw_response.create(**options)
    second = served.client.completions.with_raw_response.create(**options)
    assert len(set(job_ids(first))) == 2
    assert job_ids(second) == job_ids(first)
    assert [choice.text for choice in second.parse().choices] == [choice.text for choice in first.parse().choices]


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"suffix": "x"}, "suffix"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": ["a", 1]}, "prompt.1"),
    ({"prompt": [300]}, "prompt"),
    ({"logprobs": 6}, "logprobs"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"best_of": 2, "stream": True}, "best_of"),
    ({"messages": []}, "messages"),
    ({"prompt": ["x"] * 129}, "prompt"),
]


@pytest.mark.parametrize(("fields", "param"), REFUSALS, ids=lambda value: value if isinstance(value, str) else "")
def test_what_is_not_served_is_refused_by_name(client: openai.OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        client.post("/completions", body={"model": "fake", "prompt": "Once"} | fields, cast_to=object)
    assert raised.value.param == param, raised.value.message
