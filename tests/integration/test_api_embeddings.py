"""Embedding jobs over the native API: how they are asked for, refused, shown and followed."""

import base64
from typing import Any

import httpx
import jsonschema
import numpy as np
import pytest
from pydantic import TypeAdapter

from dialects.native import JobView
from domain.catalog import Catalog
from domain.jobs import JobKind, JobStatus, parse_id
from domain.requests import MAX_INPUTS
from tests.integration.api_harness import CONTEXT, MODEL, ApiServer, HandWorker
from tests.integration.runner_harness import Rig

INPUTS = ["Hello", "snow \u2603"]


def post(http: httpx.Client, **fields: Any) -> httpx.Response:
    return http.post("/v1/jobs", json={"model": MODEL, "inputs": INPUTS} | fields)


def test_a_body_with_inputs_is_an_embedding_job(http: httpx.Client, hand_worker: HandWorker) -> None:
    response = post(http, dimensions=4, metadata={"a": "b"})
    assert response.status_code == 202, response.text
    job = TypeAdapter(JobView).validate_json(response.content)
    assert (job["kind"], job["status"]) == (JobKind.EMBEDDING, JobStatus.QUEUED)
    claimed = hand_worker.claim(job["id"])
    assert claimed.input_lengths == [5, 8]
    assert bytes(claimed.prompt_token_ids).decode() == "".join(INPUTS)
    seen = http.get(job["urls"]["get"], params={"include": "input,output"}).json()
    assert (seen["input"]["inputs"], seen["input"]["dimensions"], seen["output"]) == (INPUTS, 4, None)
    assert seen["usage"]["prompt_tokens"] == 13


def test_the_kind_may_be_said(http: httpx.Client) -> None:
    assert post(http, kind="embedding").json()["kind"] == "embedding"
    assert http.post("/v1/jobs", json={"model": MODEL, "prompt": "x", "kind": "generation"}).status_code == 202


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"inputs": []}, "inputs"),
        ({"inputs": [""]}, "inputs.0"),
        ({"inputs": ["a", []]}, "inputs.1"),
        ({"inputs": [[257]]}, "inputs.0"),
        ({"inputs": [[-1]]}, "inputs.0.0"),
        ({"inputs": ["x" * (CONTEXT + 1)]}, "inputs.0"),
        ({"inputs": ["a"] * (MAX_INPUTS + 1)}, "inputs"),
        ({"dimensions": 0}, "dimensions"),
        ({"dimensions": 9}, "dimensions"),
        ({"params": {}}, "params"),
        ({"inputs": None, "kind": "embedding"}, "inputs"),
        ({"model": "nobody"}, "model"),
    ],
)
def test_what_cannot_be_embedded_is_refused_by_name(http: httpx.Client, fields: dict[str, Any], param: str) -> None:
    response = post(http, **fields)
    assert response.status_code == (404 if param == "model" else 400), response.text
    assert response.json()["error"]["param"] == param


def test_the_same_key_with_other_inputs_is_refused(http: httpx.Client) -> None:
    first = post(http, idempotency_key="k")
    assert post(http, idempotency_key="k").json()["id"] == first.json()["id"]
    assert post(http, idempotency_key="k", inputs=["other"]).status_code == 422


def test_a_job_is_followed_to_its_vectors(rig: Rig) -> None:
    with ApiServer(rig.settings, Catalog.load(rig.settings.models_file)) as server, server.client() as client:
        job_id = client.post("/v1/jobs", json={"model": "test-model", "inputs": ["a", [98]]}).json()["id"]
        worker = rig.start()
        worker.offer([parse_id(job_id)])
        job = TypeAdapter(JobView).validate_json(client.get(f"/v1/jobs/{job_id}?wait=30").content)
        events = client.get(f"/v1/jobs/{job_id}/events").text
        output = client.get(f"/v1/jobs/{job_id}/output").json()
        document = client.get("/openapi.json").json()
    shown: Any = job["output"]
    vectors = [np.frombuffer(base64.b64decode(vector), "<f4") for vector in shown["embeddings"]]
    assert [len(vector) for vector in vectors] == [8, 8]
    assert "output.delta" not in events
    assert events.count("event: job.completed") == 1
    assert output["embeddings"] == shown["embeddings"]
    declared = document["paths"]["/v1/jobs/{job_id}/output"]["get"]["responses"]["200"]["content"]["application/json"]
    jsonschema.validate(output, declared["schema"] | {"components": document["components"]})
    assert (output["dimensions"], job["finish_reason"]) == (8, None)
