"""Rerank and score: bodies become embedding requests, and the vectors of their jobs become scores."""

import json
import math
import struct
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest

from dialects.bodies import parse_model
from dialects.openai_embeddings import EmbeddingBody, spelling_of_embeddings, to_embedding_request
from dialects.scores import (
    RerankBody,
    ScoreBody,
    rerank_from_result,
    scores_from_result,
    spelling_of_rerank,
    spelling_of_score,
    to_rerank_request,
    to_score_request,
)
from domain.catalog import ModelEntry
from domain.errors import InvalidRequest, UnsupportedParameter
from domain.jobs import Usage
from domain.requests import EmbeddingRequest, EmbeddingResult, encode_vector
from gpu_worker.engine.fake_tokens import fake_vector
from tasks.prepare import encode_inputs, refuse_unfit, refuse_ungenerable
from tests.tokenizers_of_all_kinds import sentencepiece_tokenizer
from text.models import ModelView, load_model_view
from text.tokenizers import TokenizerEncoder

VIEW = load_model_view(ModelEntry(id="fake", path="none", backend="fake", max_model_len=64))
SCORER = load_model_view(ModelEntry(id="fake", path="none", backend="fake", max_model_len=64, task="scoring"))

DOCUMENTS = ["the moon", "a fox", "tales", "rain", "the moon"]


def unit_vector(text: str) -> list[float]:
    vector = fake_vector(list(text.encode()))
    return [number / math.hypot(*vector) for number in vector]


def similarity(one: str, other: str) -> float:
    return math.fsum(a * b for a, b in zip(unit_vector(one), unit_vector(other), strict=True))


def record_of(request: EmbeddingRequest) -> Any:
    texts = [bytes(ids).decode() for ids in encode_inputs(request, VIEW)]
    vectors = tuple(encode_vector(struct.pack("<8f", *unit_vector(text))) for text in texts)
    usage = Usage(prompt_tokens=sum(map(len, texts)))
    job = SimpleNamespace(id=UUID(int=7), model_name="fake", created_at=datetime(2026, 1, 1, tzinfo=UTC))
    result = EmbeddingResult(embeddings=vectors, dimensions=8, usage=usage)
    return SimpleNamespace(job=job, request=request, result=result)


def rerank(**fields: Any) -> Any:
    content = json.dumps({"query": "fox", "documents": DOCUMENTS} | fields).encode()
    body = parse_model(content, RerankBody, None, default_model="fake")
    return rerank_from_result(record_of(to_rerank_request(body, VIEW.spec)), body)


def score(**fields: Any) -> Any:
    body = parse_model(json.dumps(fields).encode(), ScoreBody, None, default_model="fake")
    return scores_from_result(record_of(to_score_request(body, VIEW.spec)), body)


def asked(model: type[Any], fields: dict[str, Any], view: ModelView = VIEW) -> EmbeddingRequest:
    body: Any = parse_model(json.dumps(fields).encode(), model, None, default_model="fake")
    if model is EmbeddingBody:
        return to_embedding_request(body, view)
    return to_rerank_request(body, view.spec) if model is RerankBody else to_score_request(body, view.spec)


def test_documents_come_back_in_the_order_of_their_relevance() -> None:
    expected = sorted(range(5), key=lambda index: (-similarity("fox", DOCUMENTS[index]), index))
    answer = rerank()
    assert [result["index"] for result in answer["results"]] == expected
    assert [result["document"]["text"] for result in answer["results"]] == [DOCUMENTS[index] for index in expected]
    scores = [similarity("fox", DOCUMENTS[index]) for index in expected]
    assert [result["relevance_score"] for result in answer["results"]] == pytest.approx(scores, abs=1e-6)
    num_tokens = sum(map(len, ["fox", *DOCUMENTS]))
    assert answer["usage"] == {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    assert answer["id"].startswith("rerank-")

    objects = {"query": {"text": "fox"}, "documents": [{"text": text} for text in DOCUMENTS]}
    assert rerank(**objects, top_n=0, max_tokens_per_doc=60) == answer
    best = rerank(top_n=2, return_documents=False)
    assert [set(result) for result in best["results"]] == [{"index", "relevance_score"}] * 2
    assert [result["index"] for result in best["results"]] == expected[:2]


@pytest.mark.parametrize(
    ("fields", "pairs"),
    [
        ({"text_1": "fox", "text_2": DOCUMENTS}, [("fox", text) for text in DOCUMENTS]),
        ({"text_1": ["a", "b"], "text_2": ["c", "b"]}, [("a", "c"), ("b", "b")]),
        ({"queries": "a", "documents": ["c"]}, [("a", "c")]),
        ({"data_1": "a", "data_2": "a"}, [("a", "a")]),
    ],
)
def test_scores_are_of_one_text_with_many_or_of_pairs(fields: dict[str, Any], pairs: list[tuple[str, str]]) -> None:
    answer = score(**fields)
    assert [one["index"] for one in answer["data"]] == list(range(len(pairs)))
    assert [one["score"] for one in answer["data"]] == pytest.approx([similarity(*pair) for pair in pairs], abs=1e-6)
    assert answer["object"] == "list"


def test_a_long_input_is_cut_where_that_is_asked_for() -> None:
    long = "abcdefgh" * 40

    def lengths(**fields: Any) -> list[int]:
        return [len(ids) for ids in encode_inputs(EmbeddingRequest(model="fake", **fields), VIEW)]

    assert lengths(inputs=(long, "abc"), truncate_prompt_tokens=4) == [4, 3]
    assert lengths(inputs=(long, tuple(range(100))), truncate_prompt_tokens=-1) == [64, 64]
    with pytest.raises(InvalidRequest, match=r"inputs\.0 has 320 tokens"):
        lengths(inputs=(long,))
    with pytest.raises(InvalidRequest, match="truncate_prompt_tokens is 65"):
        lengths(inputs=(long,), truncate_prompt_tokens=65)
    assert score(text_1=long, text_2="abcd", truncate_prompt_tokens=4)["data"][0]["score"] > 0.999


def test_a_request_without_truncation_is_stored_as_before() -> None:
    assert "truncate_prompt_tokens" not in EmbeddingRequest(model="m", inputs=("a",)).model_dump(mode="json")


def test_a_conversation_is_one_input() -> None:
    body = EmbeddingBody.model_validate({"model": "fake", "messages": [{"role": "user", "content": "Hi"}]})
    request = to_embedding_request(body, VIEW)
    assert len(request.inputs) == 1
    assert spelling_of_embeddings(body)["inputs"] == "messages"
    asking = to_embedding_request(body.model_copy(update={"add_generation_prompt": True}), VIEW)
    assert len(asking.inputs[0]) >= len(request.inputs[0])


@pytest.mark.parametrize(
    ("model", "fields", "param"),
    [
        (RerankBody, {"documents": ["a"]}, "query"),
        (RerankBody, {"query": "a", "documents": []}, "documents"),
        (RerankBody, {"query": "a", "documents": ["b"] * 1001}, "documents"),
        (RerankBody, {"query": "a", "documents": ["b", ""]}, "documents.1"),
        (RerankBody, {"query": "", "documents": ["b"]}, "query"),
        (RerankBody, {"query": "a", "documents": [{"title": "b"}]}, "documents.0.text"),
        (RerankBody, {"query": "a", "documents": [3]}, "documents.0"),
        (RerankBody, {"query": "a", "documents": ["b"], "top_n": -1}, "top_n"),
        (RerankBody, {"query": "a", "documents": ["b"], "max_tokens_per_doc": 0}, "truncate_prompt_tokens"),
        (ScoreBody, {"text_1": "a"}, "text_2"),
        (ScoreBody, {"text_1": ["a", "b"], "text_2": ["c"]}, "text_1"),
        (ScoreBody, {"text_1": [], "text_2": []}, "text_1"),
        (ScoreBody, {"text_1": "a", "text_2": []}, "text_2"),
        (ScoreBody, {"text_1": "a", "text_2": ["b", ""]}, "text_2.1"),
        (ScoreBody, {"text_1": "a", "text_2": ["b"] * 2048}, "text_2"),
        (EmbeddingBody, {}, "input"),
        (EmbeddingBody, {"input": "a", "messages": [{"role": "user", "content": "b"}]}, "messages"),
        (EmbeddingBody, {"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        (EmbeddingBody, {"input": "a", "truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        (EmbeddingBody, {"input": "a", "add_generation_prompt": True}, "add_generation_prompt"),
    ],
)
def test_what_cannot_be_scored_is_refused_by_name(model: Any, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        asked(model, fields)
    assert (refused.value.param or "").startswith(param), refused.value.message
    assert param.partition(".")[0] in refused.value.message


def test_a_place_among_the_inputs_has_its_name_in_the_body() -> None:
    body = RerankBody.model_validate({"model": "m", "query": "a", "documents": ["b", "c"]})
    assert spelling_of_rerank(body, VIEW.spec)["inputs.2"] == "documents.1"
    assert spelling_of_rerank(body, SCORER.spec)["inputs.1"] == "documents.1"
    pairs = ScoreBody.model_validate({"model": "m", "text_1": "a", "text_2": ["b", "c"]})
    spelling = spelling_of_score(pairs, VIEW.spec)
    assert [spelling[f"inputs.{number}"] for number in range(3)] == ["text_1", "text_2.0", "text_2.1"]
    spelling = spelling_of_score(pairs, SCORER.spec)
    assert [spelling["queries.0"], spelling["inputs.0"], spelling["inputs.1"]] == ["text_1", "text_2.0", "text_2.1"]


# A scoring model, which reads the two texts of a pair together


def scored(request: EmbeddingRequest) -> Any:
    """A record in which each pair's score is its number of tokens, negated."""
    lengths = [len(ids) for ids in encode_inputs(request, SCORER)]
    job = SimpleNamespace(id=UUID(int=7), model_name="fake", created_at=datetime(2026, 1, 1, tzinfo=UTC))
    numbers = tuple(encode_vector(struct.pack("<f", -length)) for length in lengths)
    result = EmbeddingResult(embeddings=numbers, dimensions=1, usage=Usage(prompt_tokens=sum(lengths)))
    return SimpleNamespace(job=job, request=request, result=result)


def test_a_scoring_model_reads_the_query_with_each_document() -> None:
    body = parse_model(b'{"query": "fox", "documents": ["the moon", "a"]}', RerankBody, None, default_model="fake")
    request = to_rerank_request(body, SCORER.spec)
    assert (request.queries, request.inputs, request.num_chars) == (("fox",), ("the moon", "a"), 2 * 3 + 9)
    end = SCORER.vocab_size - 1
    assert encode_inputs(request, SCORER) == [[*b"fox", end, *b"the moon", end], [*b"fox", end, *b"a", end]]
    answer = rerank_from_result(scored(request), body)
    assert [(result["index"], result["relevance_score"]) for result in answer["results"]] == [(1, -6.0), (0, -13.0)]


def test_pairs_are_scored_in_their_order() -> None:
    body: Any = parse_model(b'{"text_1": ["a", "b"], "text_2": ["cc", "d"]}', ScoreBody, None, default_model="fake")
    request = to_score_request(body, SCORER.spec)
    assert (request.queries, request.inputs) == (("a", "b"), ("cc", "d"))
    assert [view["score"] for view in scores_from_result(scored(request), body)["data"]] == [-5.0, -4.0]


def test_a_cut_takes_from_the_document_and_leaves_the_query() -> None:
    request = EmbeddingRequest(model="fake", queries=("fox",), inputs=("fox and fox",), truncate_prompt_tokens=9)
    end = SCORER.vocab_size - 1
    assert encode_inputs(request, SCORER) == [[*b"fox", end, *b"fox ", end]]


@pytest.mark.parametrize(
    ("view", "fields", "error", "param"),
    [
        (SCORER, {"inputs": ["a"]}, UnsupportedParameter, "model"),
        (VIEW, {"inputs": ["a"], "queries": ["b"]}, UnsupportedParameter, "queries"),
        (SCORER, {"inputs": ["a", [1, 2]], "queries": ["b"]}, InvalidRequest, "inputs.1"),
    ],
)
def test_queries_are_for_scoring_models_only(view: Any, fields: Any, error: Any, param: str) -> None:
    with pytest.raises(error) as refused:
        refuse_unfit(EmbeddingRequest(model="fake", **fields), view)
    assert refused.value.param == param


@pytest.mark.parametrize("num_queries", [2, 4])
def test_there_is_one_query_or_one_for_each_input(num_queries: int) -> None:
    with pytest.raises(ValueError, match=f"queries has {num_queries} texts and inputs has 3"):
        EmbeddingRequest(model="fake", inputs=("a", "b", "c"), queries=("q",) * num_queries)


def test_a_scoring_model_generates_nothing() -> None:
    with pytest.raises(UnsupportedParameter, match="task is 'scoring'"):
        refuse_ungenerable(SCORER)


def test_the_special_tokens_around_a_cut_text_stay() -> None:
    view = load_model_view(ModelEntry(id="fake", path="none", backend="fake", max_model_len=64))

    class Bracketed(TokenizerEncoder):
        def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
            ids = super().encode(text, add_special_tokens=False)
            return [1, *ids, 2] if add_special_tokens else ids

    view._encoder = Bracketed(sentencepiece_tokenizer())
    view.vocab_size = 10**6
    whole = view.encode_input("one two three four", 0)
    for num_tokens in range(3, len(whole)):
        cut = view.encode_input("one two three four", 0, num_tokens)
        assert cut == [*whole[: num_tokens - 1], 2]
    assert view.encode_input("one two three four", 0, 1) == [1]
