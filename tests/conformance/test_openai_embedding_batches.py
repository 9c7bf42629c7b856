"""Batches of embeddings through the unmodified SDK: each line is answered, or refused, as its route would have."""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from openai.types import Batch as SdkBatch
from sqlalchemy import select
from sqlalchemy.orm import Session, sessionmaker

from domain.catalog import Catalog, ModelSpec
from domain.jobs import parse_id_of_other
from domain.requests import EmbeddingRequest
from maintenance.batches import BatchWork
from settings import Settings
from storage import batch_lines, jobs
from storage.files import Batch
from storage.tables import JobPayload
from tests.conformance.harness import Served
from tests.conformance.test_openai_embeddings import MODEL, TEXTS, embedding
from tests.conformance.test_openai_files_batches import create, job_ids, read_lines, work
from tests.integration.api_harness import HandWorker
from tests.integration.test_engine_embedding import ENCODERS, save, tiny_encoder
from tests.waiting import wait_until
from text.models import ModelViews

__all__ = ["embedding", "work"]

URL: Any = "/v1/embeddings"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the model behind `embedding`: a BERT with 128 positions."""
    path = tmp_path_factory.mktemp("bert")
    save(tiny_encoder(ENCODERS["bert"]), path, "mean_tokens")
    return path


@pytest.fixture
def rig_work(embedding: Served) -> Iterator[BatchWork]:
    """Maintenance of `embedding`, to be stepped by hand."""
    rig = embedding.rig
    views = ModelViews(Catalog.load(rig.settings.models_file))
    work = BatchWork(rig.sessions, views, rig.settings)
    yield work
    work.close()


def line(number: int, *, url: str = URL, **body: Any) -> dict[str, Any]:
    fields = {"model": "fake", "input": f"Number {number}"} | body
    return {"custom_id": f"line-{number}", "method": "POST", "url": url, "body": fields}


def errors_of(client: openai.OpenAI, batch: SdkBatch) -> list[Any]:
    errors = client.batches.retrieve(batch.id).errors
    assert errors is not None
    return errors.data or []


def vectors(body: dict[str, Any]) -> list[Any]:
    """Of an answer, in order, out of either format."""
    embeddings = [item["embedding"] for item in body["data"]]
    return [np.frombuffer(base64.b64decode(one), "<f4") if isinstance(one, str) else one for one in embeddings]


def shape(body: dict[str, Any]) -> dict[str, Any]:
    """Everything of an answer but its numbers, which depend in their last bits on what ran in the same pass."""
    return body | {"data": [item | {"embedding": type(item["embedding"]).__name__} for item in body["data"]]}


def test_each_line_is_answered_as_its_route_would_have(embedding: Served, rig_work: BatchWork) -> None:
    bodies: list[dict[str, Any]] = [
        {"input": TEXTS[0]},
        {"input": TEXTS, "encoding_format": "base64", "dimensions": 5},
        {"input": [7, 8, 9], "encoding_format": "float", "user": "me"},
        {"input": [[7, 8, 9], [5], [6, 6]]},
        {"input": [*TEXTS, TEXTS[0]]},
        {"input": ["short", "much too long " * 100]},
    ]
    client = embedding.client
    lines = [line(number, **body, model=MODEL) for number, body in enumerate(bodies)]
    batch = create(client, *lines, endpoint=URL)

    def has_ended() -> bool:
        rig_work.tick()
        with embedding.rig.sessions.begin() as session:
            dispatched = jobs.let_lines_in(session, MODEL, limit=8)
        embedding.worker.offer(dispatched)
        return client.batches.retrieve(batch.id).status == "completed"

    wait_until(has_ended, "the batch has ended")
    batch = client.batches.retrieve(batch.id)
    assert batch.request_counts is not None
    assert batch.request_counts.model_dump() == {"total": 6, "completed": 5, "failed": 1}
    written = read_lines(client, batch.output_file_id)
    assert [one["custom_id"] for one in written] == [f"line-{number}" for number in range(5)]
    for one, asked in zip(written, lines, strict=False):
        answer = one["response"]["body"]
        assert one["response"]["status_code"] == 200
        direct = httpx.post(f"{embedding.server.url}{URL}", json=asked["body"], timeout=30).json()
        assert shape(answer) == shape(direct)
        np.testing.assert_allclose(vectors(answer), vectors(direct), atol=1e-5)
    num_tokens = sum(one["response"]["body"]["usage"]["total_tokens"] for one in written)
    assert batch.usage is not None
    assert (batch.usage.input_tokens, batch.usage.output_tokens) == (num_tokens, 0)
    [refused] = read_lines(client, batch.error_file_id)
    direct = httpx.post(f"{embedding.server.url}{URL}", json=lines[5]["body"], timeout=30)
    assert (refused["custom_id"], refused["response"]["status_code"]) == ("line-5", direct.status_code)
    assert refused["response"]["body"]["error"] == direct.json()["error"]
    assert direct.json()["error"]["param"] == "input.1"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input.1"),
        ({"input": ["a", 7]}, "input.1"),
        ({"input": ["a"] * 2049}, "input"),
        ({"dimensions": 0}, "dimensions"),
        ({"dimensions": 9}, "dimensions"),
        ({"encoding_format": "int8"}, "encoding_format"),
        ({"stream": True}, "stream"),
        ({"messages": []}, "messages"),
        ({"model": "nobody"}, "model"),
    ],
)
def test_an_invalid_line_is_refused_in_the_words_of_its_route(
    client: openai.OpenAI, http: httpx.Client, work: BatchWork, fields: dict[str, Any], param: str
) -> None:
    asked = line(2, **fields)
    batch = create(client, line(1), asked, endpoint=URL)
    work.tick()
    assert client.batches.retrieve(batch.id).status == "failed"
    [error] = errors_of(client, batch)
    direct = http.post(URL, json=asked["body"], timeout=30).json()["error"]
    assert (error.line, error.code, error.param) == (2, direct["code"], f"body.{direct['param']}")
    assert error.message == direct["message"]
    assert direct["param"] == param


def test_lines_go_to_the_route_of_their_batch_and_have_their_own_ids(client: openai.OpenAI, work: BatchWork) -> None:
    batch = create(client, line(1), line(2, url="/v1/completions"), line(1), endpoint=URL)
    work.tick()
    assert [(error.line, error.param) for error in errors_of(client, batch)] == [(2, "url"), (3, "custom_id")]


def test_a_model_that_makes_only_vectors_is_refused_for_text_when_the_file_is_read(
    client: openai.OpenAI, session_factory: sessionmaker[Session], api_settings: Settings
) -> None:
    spec = ModelSpec(id="vectors", path="fake", backend="fake", task="embedding", max_model_len=64)
    views = ModelViews(Catalog([spec]))
    work = BatchWork(session_factory, views, api_settings)
    chat = {"model": "vectors", "messages": [{"role": "user", "content": "Hi"}]}
    batch = create(client, line(1, url="/v1/chat/completions") | {"body": chat})
    work.tick()
    work.close()
    assert [(error.line, error.code, error.param) for error in errors_of(client, batch)] == [
        (1, "unsupported_parameter", "body.model")
    ]


def test_the_inputs_of_all_lines_have_a_bound_together(
    client: openai.OpenAI, work: BatchWork, session_factory: sessionmaker[Session]
) -> None:
    full = [line(number, input=["a"] * 2000) for number in range(25)]
    most = create(client, *full, endpoint=URL)
    beyond = create(client, *full, line(25), endpoint=URL)
    for batch in (most, beyond):
        while client.batches.retrieve(batch.id).status == "validating":
            work.tick()  # as often as a slow machine needs slices for a million tokens
    assert client.batches.retrieve(most.id).status == "in_progress"
    assert client.batches.retrieve(beyond.id).status == "failed"
    assert [(error.code, error.param) for error in errors_of(client, beyond)] == [("too_many_inputs", "body.input")]
    assert len(job_ids(session_factory)) == 25


def test_a_cancelled_batch_keeps_the_vectors_that_were_made(
    client: openai.OpenAI, work: BatchWork, hand_worker: HandWorker, session_factory: sessionmaker[Session]
) -> None:
    batch = create(client, *(line(number, input=["a", "bc"]) for number in range(5)), endpoint=URL)
    work.tick()
    for job_id in job_ids(session_factory)[:3]:
        hand_worker.embed(job_id, [1.0, 0.0], [0.0, 1.0])
    client.batches.cancel(batch.id)
    work.tick()
    work.tick()
    batch = client.batches.retrieve(batch.id)
    assert batch.status == "cancelled"
    written = read_lines(client, batch.output_file_id)
    assert [one["custom_id"] for one in written] == ["line-0", "line-1", "line-2"]
    assert vectors(written[0]["response"]["body"]) == [[1.0, 0.0], [0.0, 1.0]]
    errors = read_lines(client, batch.error_file_id)
    assert [one["error"]["code"] for one in errors] == ["batch_cancelled"] * 2
    assert batch.usage is not None
    assert batch.usage.total_tokens == 9


def test_lines_with_large_results_are_read_few_at_a_time(
    client: openai.OpenAI, work: BatchWork, hand_worker: HandWorker, session_factory: sessionmaker[Session]
) -> None:
    batch = create(client, *map(line, range(3)), endpoint=URL)
    work.tick()
    numbers = np.random.default_rng(1).random(300_000, dtype=np.float32).tolist()
    for job_id in job_ids(session_factory):
        hand_worker.embed(job_id, numbers)
    batch_id = parse_id_of_other(batch.id, "batch")
    with session_factory.begin() as session:
        batch_lines.record_ended(session, session.get_one(Batch, batch_id))
        for max_bytes, num_lines in {1: 1, 2_500_000: 1, 3_500_000: 2, 10**9: 3}.items():
            found = batch_lines.ended_lines(session, batch_id, after=0, limit=50, max_bytes=max_bytes)
            assert len(found) == num_lines
    work.tick()
    assert client.batches.retrieve(batch.id).status == "completed"
    written = read_lines(client, client.batches.retrieve(batch.id).output_file_id)
    assert [vectors(one["response"]["body"]) == [numbers] for one in written] == [True] * 3


def test_a_line_of_vectors_takes_one_of_the_slots_that_batches_may_have(
    client: openai.OpenAI, work: BatchWork, hand_worker: HandWorker, session_factory: sessionmaker[Session]
) -> None:
    create(client, *map(line, range(3)), endpoint=URL)
    work.tick()
    for job_id in job_ids(session_factory)[:2]:
        hand_worker.claim(job_id)
    with session_factory() as session:
        assert batch_lines.count_outstanding(session, "fake") == 2


def test_lines_run_in_the_order_of_the_file(
    client: openai.OpenAI, work: BatchWork, session_factory: sessionmaker[Session]
) -> None:
    batch = create(client, *(line(number, input=[number]) for number in range(40)), endpoint=URL)
    work.tick()
    assert client.batches.retrieve(batch.id).status == "in_progress"
    with session_factory() as session:
        requests = session.scalars(select(JobPayload.request).order_by(JobPayload.job_id)).all()
    assert [request.inputs for request in requests if isinstance(request, EmbeddingRequest)] == [
        ((number,),) for number in range(40)
    ]
