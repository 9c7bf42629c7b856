"""What a request and a model registry may say."""

import math
from pathlib import Path

import pytest
from pydantic import ValidationError

from domain.catalog import Catalog
from domain.errors import ModelNotFound
from domain.jobs import FinishReason
from domain.requests import MAX_CHOICES, ChatMessage, GenerationRequest, ResultChoice, SamplingParams, best_choices


def test_a_request_survives_storage_unchanged() -> None:
    params = SamplingParams(temperature=0.7, stop=("\n", "☃"), logit_bias={5: -1.5}, seed=-(2**63), n=2)
    request = GenerationRequest(model="m", messages=(ChatMessage(role="user", content="nul \x00"),), params=params)
    assert GenerationRequest.model_validate_json(request.model_dump_json()) == request


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"prompt": "a", "messages": [{"role": "user", "content": "b"}]},
        {"prompt": ""},
        {"messages": []},
        {"prompt": "a", "params": {"temperature": math.nan}},
        {"prompt": "a", "params": {"temperature": math.inf}},
        {"prompt": "a", "params": {"temperature": 2.1}},
        {"prompt": "a", "prompt_token_ids": [1]},
        {"prompt_token_ids": []},
        {"prompt_token_ids": [-1]},
        {"prompt_token_ids": [2**31]},
        {"prompt": "a", "params": {"max_tokens": 0}},
        {"prompt": "a", "params": {"max_tokens": 0, "prompt_logprobs": 0, "best_of": 2}},
        {"prompt": "a", "params": {"prompt_logprobs": 21}},
        {"prompt": "a", "params": {"n": 3, "best_of": 2}},
        {"prompt": "a", "params": {"best_of": MAX_CHOICES + 1}},
        {"prompt": "a", "params": {"bad_token_ids": [-1]}},
        {"prompt": "a", "params": {"bad_token_ids": [1] * 1025}},
        {"prompt": "a", "params": {"max_tokens": 4, "min_tokens": 5}},
        {"prompt": "a", "params": {"n": MAX_CHOICES + 1}},
        {"prompt": "a", "params": {"seed": 2**63}},
        {"prompt": "a", "params": {"stop": [""]}},
        {"prompt": "a", "params": {"logit_bias": {"-1": 0.0}}},
        {"prompt": "a", "params": {"no_such": 1}},
        {"prompt": "a", "tenant_id": "mine"},
    ],
)
def test_what_is_out_of_bounds_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        GenerationRequest.model_validate({"model": "m", **fields})


def test_a_prompt_may_be_token_ids_and_scored_without_output() -> None:
    request = GenerationRequest.model_validate(
        {"model": "m", "prompt_token_ids": [5, 6], "params": {"max_tokens": 0, "prompt_logprobs": 0}}
    )
    assert (request.source, request.prompt_token_ids) == ("prompt_token_ids", (5, 6))


def test_the_best_choices_are_those_of_the_highest_mean_logprob() -> None:
    means = [-0.5, None, -0.1, -0.5]
    candidates = [
        ResultChoice(index=index, text="", finish_reason=FinishReason.STOP, num_tokens=1, mean_logprob=mean)
        for index, mean in enumerate(means)
    ]
    best = best_choices(candidates, 3)
    assert [(choice.index, choice.candidate) for choice in best] == [(0, 2), (1, 0), (2, 3)]


ENTRY = '[[models]]\nid = "{id}"\npath = "{path}"\nmax_model_len = 64\n'


def write(folder: Path, *ids: str, path: str = "weights") -> Path:
    file = folder / "models.toml"
    file.write_text("\n".join(ENTRY.format(id=model_id, path=path) for model_id in ids))
    return file


def test_the_first_model_is_the_default_and_local_folders_become_absolute(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    catalog = Catalog.load(write(tmp_path, "small", "large"))
    assert [spec.id for spec in catalog] == ["small", "large"]
    assert catalog.default.path == str(tmp_path / "weights")
    assert catalog.get("large").queue == "celeriac.large"


def test_a_hub_name_stays_a_hub_name(tmp_path: Path) -> None:
    assert Catalog.load(write(tmp_path, "small", path="org/model")).default.path == "org/model"


def test_an_unknown_model_is_refused_with_those_there_are(tmp_path: Path) -> None:
    catalog = Catalog.load(write(tmp_path, "small"))
    with pytest.raises(ModelNotFound, match="small") as refused:
        catalog.get("x" * 10_000)
    assert len(str(refused.value)) < 300


def test_a_registry_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no models"):
        Catalog.load(write(tmp_path))


@pytest.mark.parametrize(("ids", "message"), [(("a", "b", "a"), "more than once"), (("-", "b"), "id")])
def test_an_entry_that_makes_no_sense_says_where_and_leaves_the_others(
    tmp_path: Path, ids: tuple[str, ...], message: str
) -> None:
    catalog = Catalog.load(write(tmp_path, *ids))
    assert message in catalog.unavailable[ids[0]]
    assert [spec.id for spec in catalog] == ["b"]
