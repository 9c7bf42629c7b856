"""Structured output end to end, on the shipped processes: asked for over HTTP, obeyed by the embedded model."""

import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest

from settings import ROOT
from tests.chaos.plant import Plant, start_prepared

pytestmark = pytest.mark.slow

MODEL = "celeriac-mini"
MODELS = f"""
[[models]]
id = "{MODEL}"
path = "{ROOT / "models" / MODEL}"
max_model_len = 1024
max_num_seqs = 8

[[models]]
id = "fake"
path = "fake"
backend = "fake"
max_model_len = 128
"""
SCHEMA = {
    "type": "object",
    "properties": {
        "animal": {"enum": ["fox", "owl", "hare"]},
        "age": {"type": "integer", "minimum": 1, "maximum": 20},
        "words": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 3},
    },
    "required": ["animal", "age", "words"],
    "additionalProperties": False,
}
BOMBS: list[dict[str, Any]] = [
    {"json_schema": {"type": "integer", "multipleOf": 99_999_989}},
    {"regex": "((a{4096}){4096}){4096}"},
    {"json_schema": {"$ref": "#"}},
]


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    folder = Path(tempfile.mkdtemp(prefix="celeriac-structured-"))
    with Plant(folder, models=MODELS, worker_models={"gpu-1": MODEL}, start=start_prepared) as plant:
        plant.start_servers()
        plant.start_parts()
        plant.wait_until_ready()
        with httpx.Client(base_url=plant.api_urls[0], timeout=60) as client:
            yield client
    shutil.rmtree(folder, ignore_errors=True)


def ask(client: httpx.Client, output: dict[str, Any], *, model: str = MODEL, **params: Any) -> httpx.Response:
    params = {"max_tokens": 200, "temperature": 0.7, "seed": 1, "structured_output": output} | params
    body = {"model": model, "prompt": "Tell me of an animal.", "params": params}
    return client.post("/v1/jobs", json=body, headers={"prefer": "wait=50"})


def test_a_schema_is_obeyed_by_every_choice(client: httpx.Client) -> None:
    job = ask(client, {"json_schema": SCHEMA}, n=4).json()
    assert job["status"] == "completed", job
    for choice in job["output"]["choices"]:
        assert choice["finish_reason"] == "stop"
        jsonschema.validate(json.loads(choice["text"]), SCHEMA)


def test_the_other_kinds_are_obeyed(client: httpx.Client) -> None:
    def text_of(**output: Any) -> str:
        job = ask(client, output).json()
        assert job["status"] == "completed", job
        return str(job["output"]["text"])

    assert re.fullmatch("[A-Z][a-z]{2,5}, [0-9]+ years", text_of(regex="[A-Z][a-z]{2,5}, [0-9]{1,2} years"))
    assert text_of(choices=["a fox", "an owl"]) in ("a fox", "an owl")
    assert text_of(lark='start: "fox" (" and " start)?').startswith("fox")
    assert text_of(json_object=True).startswith("{")


def test_what_was_asked_for_is_kept_with_the_job(client: httpx.Client) -> None:
    job = ask(client, {"json_schema": SCHEMA}).json()
    kept = client.get(f"/v1/jobs/{job['id']}", params={"include": "input"}).json()["input"]
    assert list(kept["params"]["structured_output"]["json_schema"]["properties"]) == ["animal", "age", "words"]


@pytest.mark.parametrize("bomb", BOMBS, ids=str)
def test_a_grammar_that_costs_too_much_is_refused_and_the_next_is_served(
    client: httpx.Client, bomb: dict[str, Any]
) -> None:
    refused = ask(client, bomb)
    assert refused.status_code == 400, refused.text
    error = refused.json()["error"]
    assert error["param"] == f"params.structured_output.{next(iter(bomb))}"
    assert error["code"] == "invalid_value"
    assert ask(client, {"choices": [f"after {next(iter(bomb))}"]}).json()["status"] == "completed"


@pytest.mark.parametrize(
    ("output", "params", "param"),
    [
        ({"json_schema": {"not": {}}}, {}, "params.structured_output.json_schema"),
        ({"regex": "a" * 513}, {}, "params.structured_output.regex"),
        ({"regex": "a", "lark": 'start: "a"'}, {}, "params.structured_output"),
        ({"choices": []}, {}, "params.structured_output.choices"),
        ({"json_object": True}, {"ignore_eos": True}, "params.ignore_eos"),
    ],
)
def test_bad_requests_name_the_field(
    client: httpx.Client, output: dict[str, Any], params: dict[str, Any], param: str
) -> None:
    refused = ask(client, output, **params)
    assert refused.status_code == 400, refused.text
    assert refused.json()["error"]["param"] == param


def test_the_fake_back_end_says_that_it_follows_no_grammar(client: httpx.Client) -> None:
    refused = ask(client, {"regex": "a"}, model="fake", max_tokens=5)
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "unsupported_parameter"
