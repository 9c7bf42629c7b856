"""Rerank and score, answered from the vectors of an embedding job, which the fake back end makes up from the bytes."""

from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from domain.catalog import Catalog
from domain.jobs import parse_id
from gpu_worker import intake
from gpu_worker.engine.fake_tokens import END_TOKEN_ID, fake_vector
from tests.integration.api_harness import CONTEXT, MODEL, ApiServer
from tests.integration.runner_harness import MODEL as RUN_MODEL
from tests.integration.runner_harness import Rig

DOCUMENTS = ["the moon", "a fox", "tales", "rain", "the moon"]


@pytest.fixture
def context_length() -> int:
    return 256


@pytest.fixture
def scoring(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> Iterator[httpx.Client]:
    monkeypatch.setattr(intake, "POLL_SECONDS", 0.01)
    with ApiServer(rig.settings, Catalog.load(rig.settings.models_file)) as server, server.client() as client:
        rig.start()
        yield client


def similarity(one: str, other: str) -> float:
    a, b = (fake_vector(list(text.encode())) for text in (one, other))
    norms = [sum(number * number for number in vector) ** 0.5 for vector in (a, b)]
    similarity: float = sum(x * y for x, y in zip(a, b, strict=True)) / norms[0] / norms[1]
    return similarity


def ask(client: httpx.Client, path: str, **body: Any) -> dict[str, Any]:
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json()) | {"job": answer.headers["x-job-id"]}


def test_documents_come_back_in_the_order_of_their_relevance(scoring: httpx.Client, rig: Rig) -> None:
    expected = sorted(range(5), key=lambda index: (-similarity("fox", DOCUMENTS[index]), index))
    for path in ("/v1/rerank", "/rerank", "/v2/rerank"):
        answer = ask(scoring, path, query="fox", documents=DOCUMENTS)
        assert [result["index"] for result in answer["results"]] == expected
        assert [result["document"]["text"] for result in answer["results"]] == [DOCUMENTS[index] for index in expected]
        for result in answer["results"]:
            assert result["relevance_score"] == pytest.approx(similarity("fox", DOCUMENTS[result["index"]]), abs=1e-6)
    assert answer["model"] == RUN_MODEL
    num_tokens = sum(len(text) for text in ["fox", *DOCUMENTS])
    assert answer["usage"] == {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    assert parse_id(answer["id"]) == parse_id(answer["job"])
    assert rig.job(parse_id(answer["job"])).kind == "embedding"
    best = ask(
        scoring,
        "/v1/rerank",
        query={"text": "fox"},
        documents=[{"text": text} for text in DOCUMENTS],
        top_n=2,
        return_documents=False,
        model=RUN_MODEL,
        max_tokens_per_doc=60,
    )
    assert [set(result) for result in best["results"]] == [{"index", "relevance_score"}] * 2
    assert [result["index"] for result in best["results"]] == expected[:2]


def test_scores_are_of_one_text_with_many_or_of_pairs(scoring: httpx.Client) -> None:
    for fields, pairs in (
        ({"text_1": "fox", "text_2": DOCUMENTS}, [("fox", text) for text in DOCUMENTS]),
        ({"text_1": ["a", "b"], "text_2": ["c", "b"]}, [("a", "c"), ("b", "b")]),
        ({"queries": "a", "documents": ["c"]}, [("a", "c")]),
        ({"data_1": "a", "data_2": "a"}, [("a", "a")]),
    ):
        answer = ask(scoring, "/v1/score", **fields)
        assert [one["index"] for one in answer["data"]] == list(range(len(pairs)))
        expected = [similarity(*pair) for pair in pairs]
        assert [one["score"] for one in answer["data"]] == pytest.approx(expected, abs=1e-6)
        assert (answer["object"], answer["data"][0]["object"]) == ("list", "score")


def test_a_long_input_is_cut_where_that_is_asked_for(scoring: httpx.Client) -> None:
    long = "abcdefgh" * 40
    whole = ask(scoring, "/v1/embeddings", input=[long, "abcd"], truncate_prompt_tokens=4)
    assert whole["data"][0]["embedding"] == whole["data"][1]["embedding"]
    assert whole["usage"]["prompt_tokens"] == 8
    assert ask(scoring, "/v1/embeddings", input=long, truncate_prompt_tokens=-1)["usage"]["prompt_tokens"] == 256
    job = scoring.post("/v1/jobs", json={"inputs": [long], "truncate_prompt_tokens": 4}, headers={"prefer": "wait=20"})
    assert job.json()["usage"]["prompt_tokens"] == 4
    assert ask(scoring, "/score", text_1=long, text_2="abcd", truncate_prompt_tokens=4)["data"][0]["score"] > 0.999
    chat = ask(scoring, "/v1/embeddings", messages=[{"role": "user", "content": "Hi"}])
    assert len(chat["data"]) == 1


def test_a_scoring_model_reads_both_texts_of_a_pair(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """And refuses to do anything else."""
    monkeypatch.setattr(intake, "POLL_SECONDS", 0.01)
    entry = f'[[models]]\nid = "{RUN_MODEL}"\npath = "none"\nbackend = "fake"\ntask = "scoring"\nmax_model_len = 64\n'
    rig.settings.models_file.write_text(entry)

    def expected(query: str, text: str) -> float:
        return float(np.float32(fake_vector([*query.encode(), END_TOKEN_ID, *text.encode(), END_TOKEN_ID])[0]))

    with ApiServer(rig.settings, Catalog.load(rig.settings.models_file)) as server, server.client() as client:
        rig.start()
        answer = ask(client, "/v1/rerank", query="fox", documents=DOCUMENTS)
        scores = {result["index"]: result["relevance_score"] for result in answer["results"]}
        assert scores == {index: expected("fox", text) for index, text in enumerate(DOCUMENTS)}
        assert list(scores.values()) == sorted(scores.values(), reverse=True)
        answer = ask(client, "/v1/score", text_1=["a", "b"], text_2=["c", "d"])
        assert [one["score"] for one in answer["data"]] == [expected("a", "c"), expected("b", "d")]
        job = client.post("/v1/jobs", json={"queries": ["q"], "inputs": ["a"]}, headers={"prefer": "wait=20"}).json()
        assert (job["status"], job["output"]["dimensions"]) == ("completed", 1)
        for path, body in (("/v1/embeddings", {"input": "a"}), ("/v1/completions", {"prompt": "a"})):
            refused = client.post(path, json=body | {"model": RUN_MODEL})
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "model"), refused.text


@pytest.mark.parametrize("path", ["/v1/rerank", "/v1/score"])
def test_a_text_that_is_too_long_is_refused_by_its_name(http: httpx.Client, path: str) -> None:
    long = "c" * (CONTEXT + 1)
    texts = ("query", "documents") if path == "/v1/rerank" else ("text_1", "text_2")
    fields = dict(zip(texts, ("a", ["b", long]), strict=True))
    answer = http.post(path, json={"model": MODEL} | fields)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == f"{texts[1]}.1"
