"""Which requests may be answered by an earlier job, and which of them are the same."""

from typing import Any

import pytest

from domain.catalog import ModelSpec
from domain.job_options import JobOptions
from domain.requests import GenerationRequest, SamplingParams
from settings import Settings
from tasks.answer_keys import answer_key
from tasks.prepare import prepare_generation
from text.models import ModelView, load_model_view

SPEC = ModelSpec(id="fake", path="fake", backend="fake", max_model_len=100)
GREEDY = {"temperature": 0, "max_tokens": 4}


@pytest.fixture(scope="module")
def view() -> ModelView:
    return load_model_view(SPEC)


def key_of(
    view: ModelView, params: dict[str, Any], *, prompt: str = "a", use_cache: bool | None = None, cache: str = "greedy"
) -> bytes | None:
    request = GenerationRequest(model="fake", prompt=prompt, params=SamplingParams(**params))
    prepared = prepare_generation(request, view, view.encode(request))
    settings = Settings(response_cache=cache)
    return answer_key(request, JobOptions(use_cache=use_cache), view, prepared, settings)


def test_only_requests_whose_output_is_determined_have_a_key(view: ModelView) -> None:
    random, seeded = {"max_tokens": 4}, {"max_tokens": 4, "seed": 1}
    assert key_of(view, GREEDY) is not None
    assert key_of(view, {"top_p": 0, "max_tokens": 4}) is not None, "which is greedy, too"
    assert key_of(view, random) is None
    assert key_of(view, seeded) is None
    assert key_of(view, seeded, cache="seeded") is not None
    assert key_of(view, random, cache="seeded") is None
    assert key_of(view, random, use_cache=True) is not None
    for params in (GREEDY, random, seeded):
        assert key_of(view, params, use_cache=False) is None
        assert key_of(view, params, use_cache=True, cache="off") is None
        assert key_of(view, params, cache="asked") is None
        assert key_of(view, params, use_cache=True, cache="asked") == key_of(view, params, use_cache=True)


def test_a_model_can_be_left_out() -> None:
    view = load_model_view(SPEC.model_copy(update={"response_cache": False}))
    assert key_of(view, GREEDY, use_cache=True) is None


def test_the_same_is_what_the_engine_would_do_again(view: ModelView) -> None:
    key = key_of(view, GREEDY)
    assert key_of(view, GREEDY | {"seed": 5}) == key, "greedy does not draw"
    assert key_of(view, GREEDY | {"top_p": 1}) == key, "the default"
    others: list[dict[str, Any]] = [{"max_tokens": 5}, {"stop": ["a"]}, {"n": 2}, {"logprobs": 1}, {"bad_words": ["b"]}]
    schemas = [{"a": {"type": "string"}, "b": {}}, {"b": {}, "a": {"type": "string"}}]
    others += [{"structured_output": {"json_schema": {"properties": properties}}} for properties in schemas]
    keys = [key_of(view, GREEDY | other) for other in others] + [key_of(view, GREEDY, prompt="b"), key]
    assert len(set(keys)) == len(keys), "of a schema, too, the order counts"
    seeds = [key_of(view, {"max_tokens": 4, "seed": seed}, cache="seeded") for seed in (1, 2)]
    assert seeds[0] != seeds[1]
    assert key_of(view, {"max_tokens": 4}, use_cache=True) == key_of(view, {"max_tokens": 4}, use_cache=True)
