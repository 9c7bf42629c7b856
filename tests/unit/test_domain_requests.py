"""What a request and a model registry may say."""

import math
from pathlib import Path

import pytest
from pydantic import ValidationError

from domain.catalog import Catalog
from domain.errors import ModelNotFound
from domain.requests import MAX_CHOICES, ChatMessage, GenerationRequest, SamplingParams


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
        {"prompt": "a", "params": {"max_tokens": 0}},
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


@pytest.mark.parametrize(("ids", "message"), [((), "names no model"), (("a", "a"), "more than once"), (("-",), "id")])
def test_a_registry_that_makes_no_sense_says_where(tmp_path: Path, ids: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Catalog.load(write(tmp_path, *ids))
