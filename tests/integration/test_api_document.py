"""The OpenAPI document is whole, and what the fuzzer found once stays mended."""

import json

import httpx
import pytest

from api.anthropic import ANTHROPIC_REFUSALS
from api.openapi import REFUSALS, document_of
from tests.integration.api_harness import ApiServer


def test_every_reference_leads_somewhere_and_every_private_route_says_how_it_refuses(api: ApiServer) -> None:
    document = document_of(api.app)
    schemas = document["components"]["schemas"]
    text = json.dumps(document)
    assert "$defs" not in text
    references = {part.split('"')[0] for part in text.split('"$ref": "#/components/schemas/')[1:]}
    assert references <= schemas.keys()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            if path.startswith("/health") or path in ("/ping", "/version"):
                continue
            assert operation["security"] == [{"key": []}], (method, path)
            refusals = ANTHROPIC_REFUSALS if path.startswith("/v1/messages") else REFUSALS
            assert {str(status) for status in refusals} <= operation["responses"].keys(), (method, path)


def test_every_answer_has_a_schema(api: ApiServer) -> None:
    for path, operations in document_of(api.app)["paths"].items():
        for method, operation in operations.items():
            for status, answer in operation["responses"].items():
                for media_type, content in answer.get("content", {}).items():
                    is_stream = media_type == "text/event-stream"
                    assert bool(content.get("schema")) is not is_stream, (method, path, status, media_type)


def test_the_bounds_of_sampling_parameters_are_published(api: ApiServer) -> None:
    schemas = {
        path: document_of(api.app)["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/generate")
    }
    for path, schema in schemas.items():
        number = {"type": "number", "minimum": 0, "maximum": 2}
        assert schema["properties"]["temperature"]["anyOf"] == [number, {"type": "null"}], path
    logprobs = schemas["/v1/completions"]["properties"]["logprobs"]["anyOf"][0]
    assert logprobs["maximum"] == 5, "this route's own bound, not the domain's"


def test_a_field_whose_name_looks_like_a_tag_is_refused_by_its_name(http: httpx.Client) -> None:
    for answer in (http.get("/v1/dead_letters", params={"<x>": "1"}), http.post("/v1/jobs", json={"<x>": 1})):
        assert answer.status_code == 400, answer.text
    assert http.get("/v1/dead_letters", params={"<x>": "1"}).json()["error"]["param"] == "<x>"


@pytest.mark.parametrize("text", ["0.5", "1760000000", "-1"])
def test_a_number_is_no_time(http: httpx.Client, text: str) -> None:
    answer = http.get("/v1/jobs", params={"created_after": text})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "created_after"
    assert http.get("/v1/jobs", params={"created_after": "2026-10-20T12:00:00Z"}).status_code == 200


def test_a_wrong_method_is_told_all_that_the_path_answers(http: httpx.Client) -> None:
    answer = http.put("/v1/jobs/job_01")
    assert answer.status_code == 405
    assert answer.headers["allow"] == "DELETE, GET, HEAD, OPTIONS"
    assert "use DELETE, GET, HEAD, OPTIONS" in answer.json()["error"]["message"]
    for method in ("GET", "HEAD", "DELETE"):
        answer = http.request(method, "/v1/responses/input_tokens")
        assert (answer.status_code, answer.headers["allow"]) == (405, "OPTIONS, POST"), "it is no response's id"
